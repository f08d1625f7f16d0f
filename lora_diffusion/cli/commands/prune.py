"""The command that sets an adapter's smallest numbers to zero."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lora_diffusion.config.merge import WeightType


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Set the smallest numbers of an adapter to zero.

    The file does not get smaller: zeros are stored like other numbers, though an archive packs them well. Pruned deltas
    are no longer low-rank and are stored whole, which makes the file many times larger.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN", help_behavior_hint="")]
    """Adapter to read, in any dialect."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help_behavior_hint="")]
    """File to write (.safetensors)."""
    keep: float
    """Share of the numbers to keep, above 0 and at most 1."""
    what: Literal["factors", "delta"] = "factors"
    """Prune the entries of up and down (plain LoRA; shapes stay), or those of the delta (any kind but DoRA)."""
    scope: Literal["module", "adapter"] = "module"
    """Keep the share in every module, or over the whole adapter, which loses less but may empty weak modules."""
    dtype: WeightType = "keep"
    """Type of the written tensors."""
    force: bool = False
    """Replace a file that is there."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        from lora_diffusion.workflows.adapters.prune import PruneConfig, format_report, prune_file, to_json

        how = PruneConfig(keep=self.keep, what=self.what, scope=self.scope, dtype=self.dtype, force=self.force)
        done = prune_file(self.source, self.output, how)
        print(json.dumps(to_json(done)) if self.json else format_report(done))
        return 0
