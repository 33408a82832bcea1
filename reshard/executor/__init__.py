"""Bytes in motion: sources read, tiles rearranged and cast, tensors filled in memory or on a device."""
