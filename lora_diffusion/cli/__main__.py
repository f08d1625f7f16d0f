"""`python -m lora_diffusion.cli`, which `accelerate launch -m` needs."""

import sys

from lora_diffusion.cli import main

sys.exit(main())
