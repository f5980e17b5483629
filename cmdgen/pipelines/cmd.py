"""Text to video by content-frame motion-latent decomposition (CMD; Yu et al. 2024).

    text ─► content frame x̄ by the UNet ─► motion latents z, given text and x̄, by the DiT
         ─► frames' latents by the CMD decoder of x̄ and z ─► frames by the VAE decoder

arXiv:2403.14148.
"""

from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cmdgen.acceleration.calibration import Predict
from cmdgen.acceleration.graphs import fastest_libraries
from cmdgen.acceleration.memory import Work, choose_slices
from cmdgen.acceleration.overlap import Pending
from cmdgen.acceleration.rehash import CutDiT
from cmdgen.acceleration.slicer import decode_clip, encode_clip
from cmdgen.latents import Latents, check_fit, fit_model, latent_shapes
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.pipelines.base import Denoising, read_when_needed
from cmdgen.pipelines.clip import Clip, Made, Task
from cmdgen.pipelines.decode import Decoder, encode_frames
from cmdgen.pipelines.observer import Observer
from cmdgen.pipelines.still import StillPipeline
from cmdgen.request import Plan, Request, Slices
from cmdgen.video.formats import Pixels


class CmdPipeline(StillPipeline):
    """A folder with a content model, a motion model and CMD's autoencoder."""

    autoencoder: CmdAutoencoder = read_when_needed("autoencoder")
    motion: DiT = read_when_needed("motion")

    def make(self, task: Task) -> Made:
        """Make clips; a clip of one frame is its content frame. See `Pipeline.make`."""
        if not task.plan.moves:
            return super().make(task)
        decoder, stage = self.decoder(task.plan, task.observer), task.observer.stage
        # with little memory, one thing is done after another
        stream = self.side_stream if task.plan.max_memory is None else None
        with stage("text"):
            text = self.encode_text(task.plans)
        with stage("content"):
            content = self.sample_content(task, text)
        with stage("VAE decode"):
            picture = decoder.start_pictures(content.to(self.dtype), stream)
        with stage("motion"):
            motion = self.sample_motion(task, text, content, picture)
        frames = self.decode_frames(decoder, picture, content, motion, task.pixels)
        # a GPU is waited for once, when it has made everything
        return Made(frames, picture.finish().numpy(), content.cpu(), motion.cpu())

    def sample_motion(
        self, task: Task, text: Tensor, content: Tensor, picture: Pending | None = None, predict: Predict | None = None
    ) -> Tensor:
        """(B + 1, L, D), (B, C, h, w) -> (B, K, T, W' + H'): motion latents, in float32.

        `predict` stands for the motion model's own `denoise`; `picture` is shown when it is ready.
        """
        model, count, motion = task.plan.model, len(task.plans), self.motion
        if task.inputs.motion is not None:
            return self.repeat(task.inputs.motion, count)
        assert model.motion is not None
        denoiser = predict or self.denoiser("motion", motion.denoise, CutDiT(motion), task.plan)
        shape = latent_shapes(model)[1]
        columns = content.shape[-1] // self.autoencoder.config.patch
        # all that is taken of a text is the mean of its tokens
        states = text if model.motion_guidance != 1 else text[:count]
        pooled = states.mean(dim=1, keepdim=True)  # (texts, 1, D)

        def modulate(timesteps: Tensor) -> Tensor:
            """(S,) -> (S, texts, P)."""
            texts = pooled.repeat(len(timesteps), 1, 1)
            rows = motion.modulations(
                timesteps.repeat_interleave(len(pooled)), text=None if motion.config.text_width is None else texts
            )
            return rows.unflatten(0, (-1, len(pooled)))

        times = self.project_times(modulate, task.plan, model.motion.noise, model.motion_steps)

        def denoise(x: Tensor, t: Tensor, which: Tensor, ground: Tensor) -> Tensor:
            if picture is not None:
                picture.poll()
            return denoiser(x.to(self.dtype), next(times)[which], ground)

        # guidance is on the text alone: both branches see the content frame
        ground = motion.place(*shape[1:], context=content.to(self.dtype), split=columns)
        rows = torch.arange(count, device=self.device)
        conditions = (rows, ground), (torch.full_like(rows, len(pooled) - 1), ground)
        seeds = [each.motion_seed for each in task.plans]
        what = Denoising("motion", shape, seeds, model.motion.noise, model.motion_steps, model.motion_guidance)
        sampled = self.denoise(task, what, denoise, conditions)
        return self.autoencoder.destandardise(self.check_finite(sampled, "motion"))

    def decode_frames(
        self, decoder: Decoder, picture: Pending, content: Tensor, motion: Tensor, pixels: Pixels
    ) -> np.ndarray:
        """(B, C, h, w), (B, K, T, W' + H') -> uint8 (B, T, ...) in `pixels`."""
        halves = content.to(self.dtype), motion.to(self.dtype)
        with decoder.observer.stage("frame decode"):
            rebuild = self.graphed(
                ("frame decode", decoder.slices),
                lambda content, motion: decode_clip(self.autoencoder, content, motion, decoder.slices),
                compiles=False,
            )
            latents = self.check_finite(rebuild(*halves), "autoencoder")
        with decoder.observer.stage("VAE decode"):
            picture.finish()
            return decoder.frames(latents, pixels)

    def encoding_slices(self, plan: Plan) -> Slices:
        """Return slices that keep the encoding of one clip within the plan's memory."""
        work = Work(plan.model, self.dtype, verb="encode")
        return choose_slices(work, self.device, plan.max_memory)

    @torch.inference_mode()
    def encode(
        self,
        frames: np.ndarray,
        plan: Plan,
        observer: Observer | None = None,
        *,
        origin: Mapping[str, object] | None = None,
    ) -> Latents:
        """uint8 (T, H, W, 3) -> the clip's content frame and motion latents, nothing sampled.

        `plan` gives size, length, rate and memory; `origin` goes into the metadata. Raises
        ValueError where the model makes no clips of this size and length.
        """
        model, observer = plan.model, observer or Observer()
        size, count = f"{model.width}x{model.height}", model.frames
        assert frames.shape[:3] == (count, model.height, model.width)
        fit_model(model, *latent_shapes(model))
        slices = self.encoding_slices(plan)
        self.load(observer, "autoencoder", "vae")
        with fastest_libraries(self.device):
            parts = []
            for done in range(0, count, slices.pictures):
                some = frames[done : done + slices.pictures]
                parts.append(encode_frames(self.vae, some, slices.strips))
                observer.step("encode", done + len(some), count)
            latents = rearrange(torch.cat(parts), "t c h w -> 1 c t h w")
            halves = encode_clip(self.autoencoder, latents, slices)
        content, motion = (self.check_finite(half, "autoencoder")[0].float().cpu() for half in halves)
        clip = {"frames": count, "size": size, "fps": model.fps}
        return Latents(content, motion, model.fps, {**self.identity, **clip, **(origin or {})})

    @torch.inference_mode()
    def decode(
        self, latents: Latents, plan: Plan | None = None, observer: Observer | None = None, *, pixels: Pixels = "rgb24"
    ) -> Clip:
        """Return the clip of these latents, with their metadata; ValueError where they do not fit.

        `plan`, if any, is of the latents' size and length, and may limit memory.
        """
        shapes = tuple(latents.content.shape), tuple(latents.motion.shape)
        if plan is None:
            model = fit_model(self.config, *shapes)
            plan = self.plan(Request(frames=model.frames, size=(model.height, model.width)))
        check_fit(plan.model, *shapes)
        observer = observer or Observer()
        self.load(observer, "autoencoder", "vae")
        decoder = self.decoder(plan, observer)
        content, motion = (self.repeat(half, 1) for half in (latents.content, latents.motion))
        with fastest_libraries(self.device):
            picture = decoder.start_pictures(content.to(self.dtype))
            frames = self.decode_frames(decoder, picture, content, motion, pixels)
        picture_of_clip = picture.finish()[0].numpy()
        return Clip(frames[0], pixels, picture_of_clip, latents.fps, latents.metadata, latents)
