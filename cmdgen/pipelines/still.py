"""Text to a still: text encoder, UNet, VAE decoder, as in Stable Diffusion."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cmdgen.acceleration.calibration import Predict
from cmdgen.acceleration.graphs import fastest_libraries
from cmdgen.acceleration.rehash import CutDiT, CutUNet, rehash
from cmdgen.acceleration.video import SlicedUNet, in_slices, in_turn
from cmdgen.config import CUTS
from cmdgen.diffusion.windows import denoise_windows
from cmdgen.models.layers import fuse_weights
from cmdgen.models.text import ClipTextModel
from cmdgen.models.tiny_vae import TinyVae
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.pipelines.base import Branches, Denoising, Pipeline, read_when_needed
from cmdgen.pipelines.clip import Made, Task
from cmdgen.pipelines.decode import Decoder, encode_frames
from cmdgen.pipelines.observer import Observer
from cmdgen.request import Plan, Request

Network = TypeVar("Network", bound=nn.Module)


def cut_unet(network: UNet | SlicedUNet, plan: Plan) -> CutUNet:
    """Return a UNet as step rehash runs it."""
    return CutUNet(network, CUTS.index(plan.rehash_cut or CUTS[0]))


class StillPipeline(Pipeline):
    """Any Stable Diffusion 1.5 or 2.1 folder; also the content half of CMD."""

    text_encoder: ClipTextModel = read_when_needed("text_encoder")
    unet: UNet = read_when_needed("unet")
    vae: KlVae = read_when_needed("vae")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer: prompts to token ids."""
        assert self.config.text is not None
        return Tokenizer.from_pretrained(self.folder / "tokenizer", vocab_size=self.config.text.vocab_size)

    @property
    def decoding_vae(self) -> KlVae | TinyVae:
        """Return the VAE that decodes: the model's, or a small one in its place."""
        return self.vae if self.decoder_folder is None or self.takes_vae else self.small_vae

    @cached_property
    def small_vae(self) -> TinyVae:
        """Return a small VAE that decodes."""
        assert self.decoder_folder is not None
        return TinyVae.from_pretrained(self.decoder_folder, dtype=self.dtype, device=self.device)

    def make(self, task: Task) -> Made:
        """Make stills; see `Pipeline.make`."""
        with self.stage(task, "text", "text_encoder"):
            text = self.encode_text(task.plans)
        with self.stage(task, "content", "unet"):
            content = self.sample_content(task, text)
        with self.stage(task, "VAE decode", "vae"):
            decoder = self.decoder(task.plan, task.observer)
            pictures = decoder.start_pictures(content.to(self.dtype)).finish()
            frames = decoder.still_frames(pictures, task.pixels)
        return Made(frames, pictures.numpy(), content.cpu(), None)

    def encode_text(self, plans: Sequence[Plan]) -> Tensor:
        """() -> (B + 1, L, D): the states of all prompts, then of the negative prompt."""
        prompts = [*(plan.prompt for plan in plans), plans[0].negative]
        ids = self.tokenizer(prompts, self.text_length).to(self.device)
        return self.graphed("text", lambda ids: self.text_encoder(ids).last_hidden_state, compiles=False)(ids)

    def sample_content(self, task: Task, text: Tensor, predict: Predict | None = None) -> Tensor:
        """(B + 1, L, D) -> (B, C, h, w): content frames, scaled latents, in float32.

        Of a UNet that looks along time, rows are all frames of one clip after another. `predict`
        stands for the UNet's own `denoise`.
        """
        guidance, count = task.plan.model.guidance, len(task.plans)
        if task.inputs.content is not None:
            return self.repeat(task.inputs.content, count)
        projected = self.unet.project_text(text if guidance != 1 else text[:count])
        positive = tuple(rows[:count] for rows in projected)
        negative = tuple(rows[-1:].expand(count, -1, -1, -1) for rows in projected)
        return self.sample_frames(task, (positive, negative), self.unet.project_time, guidance, predict)

    def sample_frames(
        self,
        task: Task,
        conditions: Branches,
        project_time: Callable[[Tensor], Tensor],
        guidance: float | Tensor,
        predict: Predict | None = None,
    ) -> Tensor:
        """() -> (B T, C, h, w): what the UNet makes of noise, scaled latents, in float32.

        `conditions` have a row for each clip: what the UNet reads and, after these, still latents
        (B, C, h, w) that join the channels of all frames of a clip.
        """
        plan = task.plan
        network = in_slices(self.fused(self.unet, plan), plan.slices)
        windows = plan.windows
        # each has features of its own
        predicts = [
            predict or self.denoiser("content", network.denoise, cut_unet(network, plan), plan) for _ in windows
        ]
        model, middle = plan.model, plan.rows // 2
        assert model.vae is not None
        schedule = model.noise if plan.moves or model.still_noise is None else model.still_noise
        times = self.project_times(project_time, plan, schedule, model.steps)

        def denoise(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
            if model.vision is not None:
                x = torch.cat([x, conditions[-1].repeat_interleave(plan.rows, dim=0)], dim=1)
                conditions = conditions[:-1]
            # in the same order of memory at every step: a graph's inputs are then one copy
            x = x.to(self.dtype, memory_format=torch.channels_last)
            time = next(times).repeat(len(conditions[0]), 1)
            if len(windows) > 1:
                return denoise_windows(predicts, windows, x, time, *conditions)
            return predicts[0](x, time, *conditions)

        observer = task.observer
        # without the VAE's weights there is nothing to see
        looks = observer.estimates and not plan.slices.staged

        def look(content: Tensor) -> None:
            latent = content[middle : middle + 1].to(self.dtype)
            observer.estimate(lambda: self.decoder(plan, observer).picture(latent))

        shape, seeds = (model.vae.latent_channels, *model.latent_size), [each.content_seed for each in task.plans]
        what = Denoising("content", shape, seeds, schedule, model.steps, guidance, plan.rows, plan.window, plan.overlap)
        content = self.denoise(task, what, denoise, conditions, look if looks else None)
        return self.check_finite(content, "unet")

    def denoiser(self, part: str, denoise: Predict, network: CutUNet | CutDiT, plan: Plan) -> Predict:
        """Return what runs a network at each step: `denoise`, or under step rehash the network in two parts."""

        def prepare(key: object, function: Callable[..., Any]) -> Callable[..., Any]:
            return in_turn(self.graphed((key, plan.slices.bytes, plan.slices.streams), function), plan.slices)

        if plan.key_steps is None:
            return prepare(part, denoise)
        return rehash(network, getattr(plan.key_steps, part), prepare)

    def decoder(self, plan: Plan, observer: Observer | None = None) -> Decoder:
        """Return the VAE with the plan's slices."""
        prepare = partial(self.graphed, compiles=False)
        vae = self.fused(self.decoding_vae, plan)
        return Decoder(vae, plan.slices, self.check_finite, observer or Observer(), prepare)

    def fused(self, network: Network, plan: Plan) -> Network:
        """Return a network with fused weights, where it has memory and a GPU for that."""
        if self.device.type == "cuda" and plan.max_memory is None:
            fuse_weights(network)
        return network

    @torch.inference_mode()
    def encode_still(self, picture: np.ndarray) -> Tensor:
        """uint8 (H, W, 3) -> (C, h, w) on the CPU: the content frame of a clip that shows it."""
        with fastest_libraries(self.device):
            latents = encode_frames(self.vae, picture[None])
        return self.check_finite(latents, "vae")[0].float().cpu()

    @torch.inference_mode()
    def decode_still(self, content: Tensor) -> np.ndarray:
        """(C, h, w) -> uint8 (H, W, 3): a content frame as a picture."""
        stride = self.vae.config.stride
        size = content.shape[1] * stride, content.shape[2] * stride
        plan = self.plan(Request(frames=1, size=size))
        with fastest_libraries(self.device):
            return self.decoder(plan).picture(self.repeat(content, 1).to(self.dtype))

    def repeat(self, half: Tensor, count: int) -> Tensor:
        """(...) -> (B, ...) float32 on the device."""
        return half.to(self.device, torch.float32).expand(count, *half.shape)

    @property
    def text_length(self) -> int:
        """Return how many tokens the text encoder reads."""
        assert self.config.text is not None
        return self.config.text.max_position_embeddings

    def fits(self, prompt: str) -> bool:
        """Return whether the text encoder reads the prompt to its end."""
        length = self.text_length
        ids = self.tokenizer([prompt], length + 1)
        # a longer text has a token of its own where one that fits has ended
        return int(ids[0, length - 1]) in (self.tokenizer.eos_id, self.tokenizer.pad_id)
