"""A style with the defaults of the base's family, for `accelerate launch`; the same as `lora-diffusion train style`.

    accelerate launch -m train_scripts.style pictures --output ink.safetensors --trigger sks

The defaults are in `lora_diffusion/config/defaults.py`; `--set SECTION.KEY=VALUE` changes any of them.
"""

import sys

from lora_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "style", *sys.argv[1:]]))
