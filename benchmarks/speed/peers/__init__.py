"""What a user could pick instead, one file each. `benchmarks/speed/__init__.py` says how to add one."""
