"""A UNet that looks along time, then the VAE: AnimateDiff from text, Stable Video Diffusion from a picture.

    AnimateDiff   text ─► UNet with motion modules, all frames together ─► VAE, frame by frame
    SVD           picture ─► CLIP, one token ─────────┐
                  picture ─► VAE, beside all frames ─► UNet of blended layers ─► VAE of blended layers

arXiv:2307.04725, arXiv:2311.15127.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cmdgen.acceleration.calibration import Predict
from cmdgen.models.vision import ClipVisionModel
from cmdgen.pipelines.base import Branches, read_when_needed
from cmdgen.pipelines.clip import Clip, Inputs, Made, Task
from cmdgen.pipelines.still import StillPipeline
from cmdgen.request import Plan, Request
from cmdgen.video.pixels import to_unit
from cmdgen.video.read import fit, read_video


class MotionPipeline(StillPipeline):
    """A Stable Diffusion 1.x folder with motion modules; a clip of one frame is its still."""

    def change(self, name: str, part: Any) -> Any:
        """Return a part with what LoRA changes of its weights; the UNet comes with its motion modules."""
        if name == "unet" and self.config.adapter is not None:
            part.attach(self.part("motion_adapter"))
        return super().change(name, part)

    def make(self, task: Task) -> Made:
        """Make clips; see `Pipeline.make`."""
        if not task.plan.moves:
            return super().make(task)
        frames = self.sample_clips(task)
        latents = rearrange(frames, "(b t) c h w -> b c t h w", b=len(task.plans))
        with self.stage(task, "VAE decode", "vae"):
            made, middles = self.decoder(task.plan, task.observer).clips(latents.to(self.dtype), task.pixels)
        return Made(made, middles.numpy(), latents[:, :, latents.shape[2] // 2].cpu(), None)

    def sample_clips(self, task: Task, predict: Predict | None = None) -> Tensor:
        """() -> (B T, C, h, w): clips' scaled latents; `predict` stands for the UNet's own `denoise`."""
        with self.stage(task, "text", "text_encoder"):
            text = self.encode_text(task.plans)
        with self.stage(task, "content", "unet"):
            return self.sample_content(task, text, predict)


class PicturePipeline(MotionPipeline):
    """Stable Video Diffusion: a picture that moves."""

    image_encoder: ClipVisionModel = read_when_needed("image_encoder")

    def sample(self, prompt: str | None = None, **options: Any) -> Clip:
        """Make one clip of the picture that `image` names; see `Pipeline.sample`."""
        request = Request(prompt, **options)
        if request.image is None:
            raise ValueError(f"{self.config.name} animates a picture: give it as image")
        picture = read_video(request.image, max_frames=1)[0][0]
        return self.run([self.plan(request)], inputs=Inputs(image=picture))[0]

    def sample_clips(self, task: Task, predict: Predict | None = None) -> Tensor:
        """() -> (B T, C, h, w): the latents of clips of one picture; see `MotionPipeline.sample_clips`."""
        if task.inputs.image is None:
            raise ValueError(f"{self.config.name} animates a picture: give it with --image")
        model = task.plan.model
        with self.stage(task, "image", "image_encoder", "vae"):
            token, still = self.encode_picture(task.inputs.image, task.plans)
        # as it was trained: the rate counts from 0
        about = self.config.fps - 1.0, float(model.motion_amount or 0), float(model.image_noise or 0)
        numbers = torch.tensor([about], device=self.device)

        def project(times: Tensor) -> Tensor:
            return self.unet.project_time(times, numbers.expand(len(times), -1))

        first = model.guidance if model.guidance_first is None else model.guidance_first
        scale = torch.linspace(first, model.guidance, model.frames, device=self.device)
        rows = scale.repeat(len(task.plans)).view(-1, 1, 1, 1)
        with self.stage(task, "content", "unet"):
            guidance = 1.0 if max(first, model.guidance) <= 1 else rows
            return self.sample_frames(task, self.condition(token, still), project, guidance, predict)

    def encode_picture(self, picture: np.ndarray, plans: Sequence[Plan]) -> tuple[Tensor, Tensor]:
        """uint8 (H, W, 3) -> the token (1, 1, D) and the latents (B, C, h, w) of a picture."""
        model = plans[0].model
        whole, fitted = (
            to_unit(torch.tensor(each, device=self.device).permute(2, 0, 1)[None])
            for each in (picture, fit(picture, model.size))
        )
        token = self.check_finite(self.image_encoder.see(whole), "image_encoder")[:, None]  # (1, 1, D)
        noise, _ = self.noise("image", tuple(fitted.shape[1:]), [plan.seed for plan in plans])
        return token, self.encode_exactly(fitted + (model.image_noise or 0) * noise)

    def condition(self, token: Tensor, still: Tensor) -> Branches:
        """(1, 1, D), (B, C, h, w) -> what the UNet reads of a picture, and its latents; of nothing, zeros."""
        positive, negative = (
            tuple(rows.expand(len(still), -1, -1) for rows in self.unet.project_text(each))
            for each in (token, torch.zeros_like(token))
        )
        return (*positive, still), (*negative, torch.zeros_like(still))

    def encode_exactly(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w), unscaled, in float32 whatever the weights are.

        In half precision the encoder overflows, and it runs once.
        """
        encoder = self.vae.encoder, self.vae.quant_conv
        for part in encoder:
            part.float()
        try:
            return self.check_finite(self.vae.encode(pictures)[0], "vae")
        finally:
            for part in encoder:
                part.to(self.dtype)
