"""What every room needs from the machine: devices, the processes of a launch, batch-invariant CPU work, digests.

Imports torch and ``errors`` only.
"""
