"""What every room needs: devices, processes of a launch, batch-invariant CPU work, digests, model folders, 8-bit RGB.

Imports ``errors`` only, and torch where it is needed.
"""
