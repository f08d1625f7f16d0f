"""Shard the weights of a frozen UNet across processes, for a base that is too large for one GPU.

Each process keeps a part of every block's weights and gathers the rest while the block runs (ZeRO-3 [arXiv:1910.02054],
implemented by PyTorch's FSDP2). The adapter is replicated in every process and trained with DistributedDataParallel:
sharding its gradients and optimizer state as well, as FSDP and ZeRO-2 do, would save only a few hundred megabytes.
"""

# PyTorch's data-parallel classes are untyped, and one setting of theirs has no public function.
# pyright: standard

from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_diffusion.errors import ConfigError
from lora_diffusion.models.load import Base

_SHARDED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Class names of the modules whose weights are gathered together."""


def check_data_parallel(accelerator: Accelerator) -> None:
    """Raise ConfigError if Accelerate was launched with a strategy that shards trainable parameters."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"accelerate is configured for {kind.value}, which shards trainable parameters; adapters are too small to "
            "benefit from that. Launch with --multi_gpu (train_scripts/accelerate/one_machine.yaml), and set "
            "compute.shard to true to shard the frozen base"
        )


def shard_base(base: Base, denoiser: nn.Module, parameters: Mapping[str, nn.Parameter], processes: int) -> None:
    """Shard the frozen weights of the UNet in place.

    Args:
        base: The base whose UNet is sharded.
        denoiser: The module that DistributedDataParallel will wrap; frozen parameters are excluded from it.
        parameters: Trainable parameters, which are not sharded.
        processes: Number of processes.

    Raises:
        ConfigError: If there is only one process.
    """
    if processes == 1:
        raise ConfigError(
            "compute.shard needs several processes to shard the base across, but there is one; start the run with "
            "accelerate launch, or set compute.shard to false"
        )
    unet, mesh, replicated = base.pipe.unet, init_device_mesh(base.device.type, (processes,)), set(parameters.values())
    for module in [each for each in unet.modules() if type(each).__name__ in _SHARDED_BLOCKS] + [unet]:
        fully_shard(module, mesh=mesh, ignored_params=replicated)
    frozen = [name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad]
    # PyTorch has no public way to exclude frozen parameters [github.com/pytorch/pytorch/issues/43690], which it would
    # broadcast at the start. The public `init_sync=False` would prevent that, but Accelerate makes the wrapper and does
    # not pass it on. tests/training/test_private_apis.py watches this API.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(denoiser, frozen)
