"""The frozen UNet's weights shared out among processes, for a base that is too large for one GPU.

Each process keeps its part of every block and gathers the others' while the block works (ZeRO-3 [arXiv:1910.02054], as
PyTorch's FSDP2 does it). The adapter is small and stays whole in each process, trained by plain data parallelism:
sharing out its gradients and the optimizer's state, which FSDP and ZeRO-2 do, would save a few hundred megabytes.
"""

from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_diffusion.errors import ConfigError
from lora_diffusion.models.load import Base

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""What is gathered at a time."""


def check_data_parallel(accelerator: Accelerator) -> None:
    """Raise ConfigError for a launch that would share out the adapter too."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"accelerate is set up for {kind.value}, which shares out what is trained, and an adapter is too small for "
            "that to help; launch with --multi_gpu (train_scripts/accelerate/one_machine.yaml), and set compute.shard "
            "to true to share out the frozen base"
        )


def shard_base(base: Base, denoiser: nn.Module, parameters: Mapping[str, nn.Parameter], processes: int) -> None:
    """Keep a part of the UNet's frozen weights in each process. Raises ConfigError if there is only one."""
    if processes == 1:
        raise ConfigError("compute.shard shares the base out among processes, and there is one; see accelerate launch")
    unet, mesh, whole = base.pipe.unet, init_device_mesh(base.device.type, (processes,)), set(parameters.values())
    for module in [each for each in unet.modules() if type(each).__name__ in BLOCKS] + [unet]:
        fully_shard(module, mesh=mesh, ignored_params=whole)
    frozen = [name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(denoiser, frozen)
