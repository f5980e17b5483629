"""The denoising objective shared by the content and the motion model."""

import torch
from torch import Tensor

from cmdgen.config import NoiseConfig
from cmdgen.diffusion.schedule import add_noise, alphas_cumprod, split_sigma, velocity
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.training.config import DenoisingLoss
from cmdgen.training.data import TrainingData
from cmdgen.training.losses import min_snr_weights, variational_bound


class Denoising:
    """Noising, and the loss of a raw output: min-SNR weights, or a learned variance's bound."""

    def __init__(self, noise: NoiseConfig, options: DenoisingLoss, device: torch.device) -> None:
        self.min_snr = options.min_snr
        self.prediction_type = noise.prediction_type
        self.alphas = alphas_cumprod(noise).to(device)

    def noisy(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """(B, ...) x2, (B,) -> (B, ...), x0 at the timestep."""
        return add_noise(x0, noise, self.alphas[timestep])

    def loss(
        self, output: Tensor, x0: Tensor, noise: Tensor, timestep: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, C or 2C, ...), (B, C, ...) x2, (B,) -> mean over the batch, its parts.

        With 2C channels: MSE plus the variational bound, as DiT is trained (arXiv:2212.09748).
        """
        alpha = self.alphas[timestep]
        prediction, sigma = split_sigma(output.float(), x0.shape[1])
        target = noise if self.prediction_type == "epsilon" else velocity(x0, noise, alpha)
        error = (prediction - target).square().flatten(1).mean(dim=1)
        if sigma is None:
            loss = error.mean()
            if self.min_snr:
                weights = min_snr_weights(alpha, self.prediction_type, self.min_snr).float()
                loss = (weights * error).mean()
            return loss, {"mse": error.mean()}
        noisy = self.noisy(x0, noise, timestep)
        bound = variational_bound(x0, noisy, output, timestep, self.alphas).mean()
        return error.mean() + bound, {"mse": error.mean(), "bound": bound}


class Captions:
    """Token ids of training captions: re-phrased at every step, some replaced by the empty one."""

    def __init__(
        self, data: TrainingData, tokenizer: Tokenizer, length: int, *, dropout: float
    ) -> None:
        self.data, self.tokenizer, self.length, self.dropout = data, tokenizer, length, dropout

    def ids(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """() -> (B, L) int64."""
        variant = int(torch.randint(1000, (), generator=generator))
        texts = self.data.captions(indices, variant)
        dropped = (torch.rand(len(indices), generator=generator) < self.dropout).tolist()
        texts = ["" if drop else text for text, drop in zip(texts, dropped, strict=True)]
        return self.tokenizer(texts, self.length)
