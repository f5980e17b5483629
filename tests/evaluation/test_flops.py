"""Counted operations: the published figures, and what the pipeline really multiplies and reads."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cmdgen.config import ANIMATEDIFF, ANIMATEDIFF_LIGHTNING, CMD_SD15, CMD_SD21, CMD_UCF, SVD, SVD_XT, DiTConfig
from cmdgen.evaluation.flops import (
    TABLE_8,
    TABLE_9,
    TERA,
    build_networks,
    compare_with_paper,
    count,
    count_work,
    list_forwards,
)
from cmdgen.models.dit import DiT
from cmdgen.request import Request, resolve
from cmdgen.weights import build_empty

FLOAT = torch.float32


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_a_product_is_counted_once_for_each_multiply_add():
    weight = meta(5, 7)
    linear = count(lambda: F.linear(meta(2, 3, 7), weight))
    assert (linear.multiply_adds, linear.attention, linear.flops) == (210, 0, 420)
    convolution = count(lambda: F.conv2d(meta(1, 2, 8, 6), meta(3, 2, 3, 3), padding=1))
    assert convolution.multiply_adds == 3 * 2 * 9 * 48


def test_inference_mode_hides_no_convolution():
    layer = torch.nn.Conv2d(3, 5, 3, padding=1, device="meta")
    with torch.inference_mode():
        x = torch.empty(2, 3, 8, 8, device="meta")
        assert count(lambda: layer(x)).multiply_adds == 2 * 8 * 8 * 5 * 3 * 9


def test_attention_alone_is_told_apart_from_other_batched_products():
    q, k, v = meta(2, 3, 4, 5), meta(2, 3, 7, 5), meta(2, 3, 7, 6)

    def run():
        F.scaled_dot_product_attention(q, k, v)
        torch.bmm(meta(2, 3, 4), meta(2, 4, 5))

    counted = count(run)
    assert counted.attention == 2 * 3 * 4 * 7 * (5 + 6)
    assert counted.multiply_adds == counted.attention + 2 * 3 * 4 * 5


@pytest.mark.parametrize(
    ("model", "width", "name", "giga", "published"),
    [
        # without attention's products: what DeepCache and T-GATE report for Stable Diffusion 1.5
        (CMD_SD15, 512, "content", 401.6, 338.6),
        (CMD_SD15, 1024, "content", 924.3, None),
        (CMD_SD21, 512, "content", 402.1, 339.1),
        (CMD_SD21, 1024, "content", 924.8, None),
        (CMD_SD15, 512, "VAE decode", 1257.3, None),
        (CMD_SD21, 1024, "VAE decode", 2548.9, None),
        (CMD_SD15, 512, "text", 6.65, None),
        (CMD_SD21, 1024, "text", 22.56, None),
        # 20 d^2 for each of 16 x 32 x 64 tokens and 8 layers, either way
        (CMD_SD21, 1024, "frame encode", None, 773.5),
        (CMD_SD21, 1024, "frame decode", None, 773.3),
        # 12 d^2 for each of 28 layers and 512, 320 and 512 tokens
        (CMD_SD15, 512, "motion", None, 228.6),
        (CMD_SD21, 512, "motion", None, 143.0),
        (CMD_SD21, 1024, "motion", None, 228.6),
    ],
)
def test_a_forward_takes_the_known_multiply_adds(model, width, name, giga, published):
    counted = list_forwards(replace(model, height=512, width=width))[name].count
    if giga is not None:
        assert counted.multiply_adds / 1e9 == pytest.approx(giga, rel=5e-4)
    if published is not None:
        assert counted.published / 1e9 == pytest.approx(published, rel=5e-4)


@pytest.mark.parametrize(
    ("depth", "width", "heads", "giga"), [(12, 768, 12, 23.01), (24, 1024, 16, 80.71), (28, 1152, 16, 118.64)]
)
def test_dit_takes_what_its_paper_says(depth, width, heads, giga):
    # Table 4 of Peebles & Xie 2023: 256 tokens, class-conditional
    config = DiTConfig(*(4, 2, width, depth, heads), text_width=None, num_classes=1000, context_channels=None)
    model = build_empty(DiT, config)
    labels = torch.empty(1, dtype=torch.long, device="meta")
    counted = count(lambda: model(meta(1, 4, 32, 32), meta(1), labels=labels))
    assert counted.multiply_adds / 1e9 == pytest.approx(giga, rel=1e-3)


@pytest.fixture(scope="module")
def tables():
    return compare_with_paper()


def test_tables_8_and_9_are_the_papers(tables):
    assert {entry["label"]: entry["published"] for entry in tables["table_8"]} == TABLE_8
    for entry in tables["table_8"]:
        # the paper gives two digits
        assert round(entry["ours"], 2) == entry["published"]
    assert [entry["label"] for entry in tables["table_9"]] == [f"{steps} steps" for steps in TABLE_9]
    for entry in tables["table_9"]:
        assert entry["ours"] == pytest.approx(entry["published"], rel=1e-3)


def test_the_honest_count_has_guidance_attention_and_the_vae(tables):
    # of five, five and six attentions to 77 tokens; of 22 residual blocks and the time embedding
    keys_values = 2 * 77 * 1024 * (5 * 320 + 5 * 640 + 6 * 1280) / 1e12
    time = 1280 * (320 + 1280 + 5 * 320 + 5 * 640 + 12 * 1280) / 1e12
    # 128 patches of the content frame
    context = 128 * 8 * 8 * 4 * 1152 / 1e12
    assert [entry["honest"] for entry in tables["table_8"]] == pytest.approx(
        [2 * (0.491441 + 0.491347), 2 * 0.402129, 2 * 0.149572], rel=1e-4
    )
    assert tables["stages"] == pytest.approx(
        {
            "text": 2 * 2 * 0.022564,
            # two forwards a step, but keys and values of either text once, the time for both
            "content": 2 * (50 * 2 * (0.924756 - keys_values - time) + 50 * time + 2 * keys_values),
            # unguided: as many timesteps as forwards
            "motion": 2 * (50 * (0.245524 - context) + context),
            "frame decode": 2 * 1.188851,
            # sixteen frames and the content frame
            "VAE decode": 17 * 2 * 2.548879,
        },
        rel=1e-4,
    )
    assert tables["table_9"][0]["honest"] == pytest.approx(sum(tables["stages"].values()))
    more = tables["table_9"][1]["honest"] - tables["table_9"][0]["honest"]
    once = 2 * (2 * keys_values + context)
    assert more == pytest.approx(tables["stages"]["content"] + tables["stages"]["motion"] - once)


def test_a_model_without_text_is_refused():
    with pytest.raises(ValueError, match="cmd-ucf makes no video from text"):
        list_forwards(CMD_UCF)


REQUESTS = [
    {},
    {"steps": 3, "motion_steps": 2, "guidance": 1.0, "motion_guidance": 2.0, "sampler": "ddim"},
    {"sampler": "ddpm", "frames": 2, "size": (16, 16)},
    {"frames": 1, "steps": 3},
    {"steps": 4, "motion_steps": 3, "motion_guidance": 2.0, "rehash": ((0, 1), (0, 2))},
]


@pytest.mark.parametrize("options", REQUESTS)
def test_what_is_counted_is_what_the_pipeline_multiplies(pipeline, flop_counter, options):
    plan = pipeline.plan(Request(**options), batch=2)
    plans = [replace(plan, prompt=prompt) for prompt in ("a dog", "a cat")]
    with flop_counter:
        pipeline.run(plans)
    counted = count_work(plan, FLOAT, batch=2)
    assert sum(each.flops for each in counted.values()) == flop_counter.get_total_flops()


@pytest.mark.parametrize("options", REQUESTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_forwards_are_as_many_as_the_pipeline_makes(pipeline, options, batch):
    # of networks that are not called as a whole, a module that each step or decoding runs once
    watched = {
        **{"text": pipeline.text_encoder, "content": pipeline.unet.conv_in},
        **{"motion": pipeline.motion.final, "frame decode": pipeline.autoencoder.output},
        "VAE decode": pipeline.vae.decoder,
    }
    made = dict.fromkeys(watched, 0)

    def count(stage):
        def hook(*_):
            made[stage] += 1

        return hook

    hooks = [module.register_forward_hook(count(stage)) for stage, module in watched.items()]
    plan = pipeline.plan(Request(**options), batch=batch)
    pipeline.run([plan] * batch)
    for hook in hooks:
        hook.remove()
    counted = count_work(plan, FLOAT, batch=batch)
    forwards = {stage: each.forwards for stage, each in counted.items() if each.flops}
    assert forwards == {stage: times for stage, times in made.items() if times}
    assert list(counted) == ["load", *forwards, "video encode"]


def test_the_weights_of_a_forward_are_those_that_a_gradient_reaches(pipeline):
    still = torch.randn(1, 8, 8, 12)
    when, ids = torch.ones(1), torch.arange(16)[None]
    states = torch.randn(1, 16, 16)
    # two parts of 6 and 4 columns
    motion = torch.randn(1, 8, 4, 10)
    text, unet, vae = pipeline.text_encoder, pipeline.unet, pipeline.vae
    dit, autoencoder = pipeline.motion, pipeline.autoencoder
    ran = {
        "text": (text, text(ids).last_hidden_state),
        "content": (unet, unet(still, when, states)),
        "motion": (dit, dit(motion, when, text=states, context=still, split=6)),
        "frame decode": (autoencoder, autoencoder.decode(still, motion)),
        "VAE decode": (vae, vae.decode(still)),
    }
    counted = count_work(resolve(Request(), pipeline.config), FLOAT)
    assert list(counted) == ["load", *ran, "video encode"]
    for stage, (network, output) in ran.items():
        output.sum().backward()
        reached = sum(p.numel() for p in network.parameters() if p.grad is not None)
        network.zero_grad()
        work = counted[stage]
        buffers = sum(b.numel() for b in network.buffers())
        assert (work.parameters, work.weight_bytes) == (reached, 4 * (reached + buffers))
        halves = stage in ("frame decode", "VAE decode")
        assert (reached < sum(p.numel() for p in network.parameters())) is halves
    # of 560 tokens, those of one prompt
    assert counted["text"].bytes_read == counted["text"].weight_bytes - 4 * (560 - 16) * 16


def test_known_models_read_their_known_parameters():
    # Stable Diffusion 1.5's: CLIP ViT-L, the UNet, the decoder of the VAE with its convolution
    stable = resolve(Request(), replace(CMD_SD15, frames=1, autoencoder=None, motion=None))
    counted = count_work(stable, FLOAT)
    sampled = {stage: work for stage, work in counted.items() if work.flops}
    assert {stage: work.parameters for stage, work in sampled.items()} == {
        **{"text": 123_060_480, "content": 859_520_964, "VAE decode": 49_490_199}
    }
    assert counted["text"].bytes_read == 4 * (123_060_480 - (49408 - 77) * 768)
    assert [work.forwards for work in sampled.values()] == [1, 50, 1]
    assert counted["text"].weight_bytes == 4 * counted["text"].parameters


def test_random_features_are_read_and_are_no_parameters():
    gated = replace(CMD_SD15.autoencoder, attention="gated", attention_features=3)
    plain, gate = (
        list_forwards(replace(CMD_SD15, autoencoder=autoencoder))["frame decode"]
        for autoencoder in (CMD_SD15.autoencoder, gated)
    )
    parameters = dict(plain.network.named_parameters())
    assert plain.count.reads.keys() <= parameters.keys()
    # of space in each of 8 blocks, which is long enough to use them; time is not
    features = {name: read for name, read in gate.count.reads.items() if name not in parameters}
    assert list(features.values()) == [3 * 48] * 8
    assert sum(gate.count.reads.values()) == sum(plain.count.reads.values()) + 8 * 3 * 48


# 10^12 operations of one clip, counted by hand from shapes: `content`, then everything
@pytest.mark.parametrize(
    ("model", "content", "total", "parameters"),
    [
        (ANIMATEDIFF, 881.4, 924.1, 1_276_658_564 + 83_653_863 + 123_060_480),
        (SVD_XT, 3847.7, 4024.2, 1_524_623_082 + 97_742_847 + 632_076_800),
    ],
    ids=["animatediff", "svd-xt"],
)
def test_public_models_compute_what_their_shapes_say(model, content: float, total: float, parameters: int) -> None:
    work = count_work(resolve(Request(), model), torch.float16)
    assert work["content"].flops / TERA == pytest.approx(content, abs=0.06)
    assert sum(stage.flops for stage in work.values()) / TERA == pytest.approx(total, abs=0.06)
    assert work["load"].parameters == parameters


# 10^12 operations of diffusers' modules: one branch, attention in both, a decoding, what is seen, a skipped step
@pytest.mark.parametrize(
    ("model", "size", "branch", "attention", "decode", "seen", "skipped"),
    [
        (ANIMATEDIFF, (512, 512), 17.675, 4.083, 2.515, 0.013, 0.074),
        (ANIMATEDIFF, (576, 1024), 45.221, 20.211, 5.754, 0.013, 0.086),
        (ANIMATEDIFF_LIGHTNING, (512, 512), 17.749, 4.083, 2.515, 0.013, 0.074),
        (ANIMATEDIFF_LIGHTNING, (576, 1024), 45.387, 20.211, 5.754, 0.013, 0.086),
        (SVD, (576, 1024), 43.080, 17.40, 97.20, 0.335, 0.085),
        (SVD_XT, (576, 1024), 76.957, 31.14, 173.57, 0.335, 0.085),
    ],
)
def test_a_video_unet_takes_the_known_operations(model, size, branch, attention, decode, seen, skipped):
    counted = {
        name: forward.count for name, forward in list_forwards(replace(model, height=size[0], width=size[1])).items()
    }
    tera = {name: each.flops / TERA for name, each in counted.items()}
    # diffusers projects the text and the timestep for every frame, cmdgen for every clip
    more = (model.frames - 1) * (tera["content text"] * (model.vision is None) + tera["content time"])
    assert tera["content"] + more == pytest.approx(branch, abs=6e-4)
    assert 2 * 2 * counted["content"].attention / TERA == pytest.approx(attention, abs=6e-3)
    assert tera["VAE decode"] == pytest.approx(decode, abs=6e-3)
    assert tera["image" if model.vision else "text"] == pytest.approx(seen, abs=6e-4)
    assert tera["content skipped"] / tera["content"] == pytest.approx(skipped, abs=6e-4)
    if model.vision is not None:
        assert tera["image encode"] == pytest.approx(2.609, abs=6e-4)


@pytest.mark.parametrize(("size", "operations"), [((512, 512), 12.852), ((576, 1024), 34.370)])
def test_without_motion_modules_sixteen_frames_take_the_known_operations(size, operations):
    still = replace(ANIMATEDIFF, adapter=None, frames=1, height=size[0], width=size[1])
    assert 16 * list_forwards(still)["content"].count.flops / TERA == pytest.approx(operations, abs=6e-4)


@pytest.mark.parametrize(
    ("model", "size", "positions"),
    [
        (ANIMATEDIFF, (512, 512), [4096, 1024, 256, 64]),
        (ANIMATEDIFF, (576, 1024), [9216, 2304, 576, 144]),
        (SVD, (576, 1024), [9216, 2304, 576, 144]),
    ],
)
def test_levels_have_the_known_positions_and_all_skips_are_five_features(model, size, positions):
    unet = build_networks(model)["unet"]
    latent = meta(2, unet.config.in_channels, size[0] // 8, size[1] // 8)
    shapes = [unet.embed(latent).shape]
    hooks = [
        block.register_forward_hook(lambda block, inputs, skips: shapes.extend(skip.shape for skip in skips))
        for block in unet.down_blocks
    ]
    states = meta(2, 1, unet.config.cross_attention_dim)
    numbers = None if model.vision is None else meta(2, 3)
    with torch.no_grad():
        unet(latent, meta(2), states, numbers)
    for hook in hooks:
        hook.remove()
    assert sorted({shape[2] * shape[3] for shape in shapes}, reverse=True) == positions
    feature = 2 * 320 * positions[0]
    assert sum(shape.numel() for shape in shapes) == 5.0625 * feature
