"""`python -m ui`, the same as `lora-diffusion ui`."""

import sys

from lora_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["ui", *sys.argv[1:]]))
