"""The denoising objective: prediction, target and loss of a batch."""

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

_PREDICTION_TYPES: dict[str, Predicts] = {"epsilon": "epsilon", "v": "v_prediction"}


class AuxiliaryLoss(Protocol):
    """A loss that is added to the denoising loss of the pictures, or replaces it."""

    def compute_losses(
        self, denoiser: "Denoiser", latent: Tensor, noise: Tensor, timestep: Tensor, time_ids: Tensor
    ) -> Tensor:
        """Compute the losses (n,) for latents and noise (n, c, h, w), timesteps (n,) and time ids (n, 6)."""
        ...


class Denoiser(nn.Module):
    """The trained models of a base, with the loss as the forward pass.

    Target, noise schedule and parametrization are handled here; the training loop sees one loss per sample.

    Args:
        base: The base with the trainable layers.
        config: Prediction type, noise schedule and loss.
        read: Parser of the captions.
        text_learns: Whether text encoders or learned tokens are trained, so that captions must be encoded in each step.
    """

    def __init__(
        self, base: Base, config: ObjectiveConfig, read: ReadText = parse_literal, *, text_learns: bool = False
    ):
        super().__init__()
        self.unet: nn.Module = base.pipe.unet
        self.text_learns = text_learns
        encoders = base.layout.text_layers if text_learns else ()  # frozen ones may be offloaded
        self.text_encoders = nn.ModuleList(getattr(base.pipe, name) for name in encoders)
        self.base = base
        self.config, self.read = config, read
        self.auxiliary_loss: AuxiliaryLoss | None = None
        """A loss that is added to the denoising loss in training."""
        self.replacement_loss: AuxiliaryLoss | None = None
        """A loss that replaces the denoising loss."""
        self.predicts: Predicts = _PREDICTION_TYPES.get(config.prediction) or cast("Predicts", prediction_type(base))
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
        """Compute the loss of each sample of a batch.

        Args:
            latent: Latents (n, c, h, w).
            noise: Noise of the target (n, c, h, w).
            input_noise: Noise of the input (n, c, h, w), which differs with input perturbation.
            timestep: (n,), int64.
            captions: Captions of the samples.
            time_ids: SDXL's size and crop conditioning (n, 6).
            mask: Weights of the pixels (n, 1, h, w).
            hidden: Cached hidden states of the captions; if None, the captions are encoded here.
            pooled: Cached pooled embeddings of the captions, for SDXL.

        Returns:
            Losses (n,) in float32.
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
        """Return the conditioning of a batch from cached embeddings, or encode the captions if `hidden` is None."""
        if hidden is not None:
            return make_context(hidden, pooled, time_ids)
        context = encode_prompts(self.base, captions, size_px=self.base.size_px, read=self.read)
        return make_context(context.hidden, (context.added or {}).get("text_embeds"), time_ids)

    def encode_trained_context(self, captions: Sequence[str], time_ids: Tensor, frozen: TextContext) -> TextContext:
        """Encode captions with the trained text encoders.

        Args:
            captions: Captions of the samples.
            time_ids: SDXL's size and crop conditioning (n, 6).
            frozen: Conditioning of the same captions by the frozen base, returned if no text encoder is trained.
        """
        return self.make_context([*captions], time_ids, None, None) if self.text_learns else frozen

    def predict(self, latent: Tensor, noise: Tensor, timestep: Tensor, context: TextContext) -> Tensor:
        """Add noise to latents and predict with the UNet.

        Args:
            latent: (n, c, h, w).
            noise: (n, c, h, w).
            timestep: (n,), int64.
            context: Conditioning of the batch.

        Returns:
            The prediction (n, c, h, w), in the parametrization of the base.
        """
        noisy = noisy_latent(latent, noise, timestep, self.alphas_cumprod)
        unet: Any = self.unet
        return unet(
            noisy.to(next(unet.parameters()).dtype),
            timestep,
            encoder_hidden_states=context.hidden,
            added_cond_kwargs=context.added,
        ).sample
