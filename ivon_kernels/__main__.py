"""``python -m ivon_kernels``: the command ``ivon-kernels``, also where it is not installed."""

from ivon_kernels.commands.app import main

if __name__ == "__main__":
    main(program="python -m ivon_kernels")
