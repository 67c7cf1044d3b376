"""Devices, processes of a launch, batch-invariant CPU work, digests, model folders, 8-bit RGB.

Every package may import it; it imports only ``errors``, and torch inside functions where possible.
"""
