"""How fast the GPU backends are, held against fused AdamW, other IVONs, a copy of the same bytes, and the targets."""
