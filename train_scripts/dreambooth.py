"""A subject with the defaults of the base's family, for `accelerate launch`; as `lora-diffusion train dreambooth`.

    accelerate launch -m train_scripts.dreambooth pictures --output dog.safetensors --instance "photo of sks dog" \
        --class-prompt "photo of a dog"

The defaults are in `lora_diffusion/config/defaults.py`; `--set SECTION.KEY=VALUE` changes any of them.
"""

import sys

from lora_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "dreambooth", *sys.argv[1:]]))
