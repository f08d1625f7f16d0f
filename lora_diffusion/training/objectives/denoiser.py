"""What a training step minimizes: target, noise schedule and parametrization together."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from lora_diffusion.config.train import ObjectiveConfig
from lora_diffusion.models.load import Base, prediction_type
from lora_diffusion.models.text_encoding import TextContext, encode_prompts
from lora_diffusion.prompts.emphasis import ReadText, parse_literal
from lora_diffusion.training.diffusion.losses import compute_target, sample_losses
from lora_diffusion.training.diffusion.schedule import Predicts, alphas_cumprod_of, check_terminal_snr, noisy_latent
from lora_diffusion.training.inputs.captions import make_context

PREDICTIONS: dict[str, Predicts] = {"epsilon": "epsilon", "v": "v_prediction"}


class AuxiliaryLoss(Protocol):
    """A loss that is not the pictures' own."""

    def compute_losses(
        self, denoiser: "Denoiser", latent: Tensor, noise: Tensor, timestep: Tensor, time_ids: Tensor
    ) -> Tensor: ...


class Denoiser(nn.Module):
    """The trainable parts of a base, with the loss as its forward pass.

    Gives one loss per sample, so that the loop never learns what is predicted.
    """

    def __init__(
        self, base: Base, config: ObjectiveConfig, read: ReadText = parse_literal, *, text_learns: bool = False
    ):
        super().__init__()
        self.unet: nn.Module = base.pipe.unet
        self.text_learns = text_learns
        encoders = base.layout.text_layers if text_learns else ()  # frozen ones may wait elsewhere than on the device
        self.text_encoders = nn.ModuleList(getattr(base.pipe, name) for name in encoders)
        self.base = base
        self.config, self.read = config, read
        self.auxiliary_loss: AuxiliaryLoss | None = None
        """A loss beside the pictures' own."""
        self.replacement_loss: AuxiliaryLoss | None = None
        """A loss in their place."""
        self.predicts: Predicts = PREDICTIONS.get(config.prediction) or cast("Predicts", prediction_type(base))
        self.alphas_cumprod = alphas_cumprod_of(base.pipe.scheduler.alphas_cumprod, config).to(base.device)
        check_terminal_snr(self.alphas_cumprod, self.predicts)
        self.num_timesteps = len(self.alphas_cumprod)

    def forward(  # noqa: PLR0913 (the keys of a batch)
        self,
        *,
        latent: Tensor,
        noise: Tensor,
        input_noise: Tensor,
        timestep: Tensor,
        captions: list[str],
        time_ids: Tensor,
        mask: Tensor | None = None,
        hidden: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """(n,) losses for latents, noise and the input's noise (n, c, h, w), timesteps (n,) and measures (n, 6).

        `hidden` and `pooled` are the captions as frozen encoders read them; without them they are encoded here.
        """
        if self.replacement_loss is not None:
            return self.replacement_loss.compute_losses(self, latent, noise, timestep, time_ids)
        context = self.make_context(captions, time_ids, hidden, pooled)
        predicted = self.predict(latent, input_noise, timestep, context)
        target = compute_target(latent, noise, timestep, self.alphas_cumprod, self.predicts)
        losses = sample_losses(
            predicted,
            target,
            timestep=timestep,
            alphas_cumprod=self.alphas_cumprod,
            predicts=self.predicts,
            config=self.config,
            mask=mask,
        )
        if self.auxiliary_loss is None or not self.training:
            return losses
        return losses + self.auxiliary_loss.compute_losses(self, latent, noise, timestep, time_ids)

    def make_context(
        self, captions: list[str], time_ids: Tensor, hidden: Tensor | None, pooled: Tensor | None
    ) -> TextContext:
        if hidden is not None:
            return make_context(hidden, pooled, time_ids)
        context = encode_prompts(self.base, captions, size_px=self.base.size_px, read=self.read)
        return make_context(context.hidden, (context.added or {}).get("text_embeds"), time_ids)

    def encode_trained_context(self, captions: Sequence[str], time_ids: Tensor, frozen: TextContext) -> TextContext:
        """Captions as what is trained reads them; `frozen` is what the base alone reads."""
        return self.make_context([*captions], time_ids, None, None) if self.text_learns else frozen

    def predict(self, latent: Tensor, noise: Tensor, timestep: Tensor, context: TextContext) -> Tensor:
        """What the UNet makes of noisy latents."""
        noisy = noisy_latent(latent, noise, timestep, self.alphas_cumprod)
        unet: Any = self.unet
        return unet(
            noisy.to(next(unet.parameters()).dtype),
            timestep,
            encoder_hidden_states=context.hidden,
            added_cond_kwargs=context.added,
        ).sample
