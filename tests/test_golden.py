"""The reference path and the library's attention against the original's answers."""

import pytest
import torch
from golden_vectors import GOLDEN, arrays, fill, load, set_weights, text, times
from kernel_parity import DEVICE, assert_near

from minimagen_fast.diffusion_model import GaussianDiffusion
from minimagen_fast.helpers import resize_image_to
from minimagen_fast.Imagen import Imagen
from minimagen_fast.kernels import ancestral_step, use_implementation
from minimagen_fast.kernels import implementation as implementation_in_force
from minimagen_fast.Unet import Unet

UNETS = sorted(path.stem for path in GOLDEN.glob("unet_*.npz"))
IMAGENS = sorted(path.stem for path in GOLDEN.glob("imagen_*.npz"))
DIFFUSIONS = sorted(path.stem for path in GOLDEN.glob("diffusion_*.npz"))


@pytest.fixture(params=["reference", "sdpa", "auto"])
def implementation(request):
    with use_implementation(request.param):
        yield request.param


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def _unet_case(name):
    config, golden = load(name)
    unet = Unet(**config["config"])
    set_weights(unet)
    name = name.removeprefix("unet_")
    batch, side = config["batch"], config["side"]
    x = fill(f"{name}/x", (batch, unet.channels, side, side))
    embeds, mask = text(f"{name}/text_embeds", batch, config["words"], unet.text_embed_dim)
    condition = {}
    if unet.lowres_cond:
        condition["lowres_cond_img"] = fill(f"{name}/lowres_cond_img", x.shape)
        condition["lowres_noise_times"] = times(f"{name}/lowres_noise_times", batch, 1000)
    time = times(f"{name}/time", batch, 1000)
    return unet, config, golden, name, x, time, condition, {"text_embeds": embeds, "text_mask": mask}


@pytest.mark.parametrize("name", UNETS)
def test_unet_state_dict(name):
    config, _ = load(name)
    shapes = {key: list(value.shape) for key, value in Unet(**config["config"]).state_dict().items()}
    assert list(shapes.items()) == list(config["state_dict"].items())


@pytest.mark.parametrize("name", UNETS)
def test_unet_outputs(name, implementation):
    unet, _, golden, _, x, time, condition, words = _unet_case(name)
    with torch.no_grad():
        assert_close(unet(x, time, **condition, **words), golden["forward"], 1e-4)
        assert_close(unet(x, time, **condition, **words, cond_drop_prob=1.0), golden["null"], 1e-4)
        guided = unet.forward_with_cond_scale(x, time, **condition, **words, cond_scale=3.0)
        assert_close(guided, golden["guided_3"], 1e-4)
        assert_close(unet(x, time, **condition), golden["no_text"], 1e-4)


@pytest.mark.parametrize("name", UNETS)
def test_unet_gradients(name, implementation):
    _check_gradients(name)


# Together they have all there is in a U-Net; the interpreter takes half a minute for each. channels_last, which is what
# a card trains in, takes longer.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, memory_format", [("unet_attention", torch.contiguous_format), ("unet_super_test", torch.channels_last)]
)
def test_unet_on_the_triton_kernels(name, memory_format):
    with use_implementation("triton"):
        gradients = _check_gradients(name, memory_format)
    wider = "three TF32 products" if DEVICE.type == "cuda" else ()
    exact = _exact_gradients(name)
    assert gradients.keys() == exact.keys()
    for key, gradient in gradients.items():
        if exact[key].abs().max() < 1e-10:  # A bias that the norm behind it takes away: what there is is rounding.
            assert gradient.abs().max() < 1e-4, key
        else:
            assert_near(gradient, exact[key], dtype="a network", what=key, wider=wider)


def _gradients(unet, x):
    return {"x": x.grad} | {key: value.grad for key, value in unet.named_parameters() if value.grad is not None}


def _exact_gradients(name):
    """Those of the reference path in float64."""
    unet, _, _, short, x, time, condition, words = _unet_case(name)
    unet, x = unet.double(), x.double().requires_grad_()
    given = {key: value.double() if value.is_floating_point() else value for key, value in (condition | words).items()}
    with use_implementation("reference"):
        out = unet(x, time, **given)
        (out * fill(f"{short}/cotangent", out.shape)).sum().backward()
    return _gradients(unet, x)


def _check_gradients(name, memory_format=torch.contiguous_format):
    unet, config, golden, short, x, time, condition, words = _unet_case(name)
    device = DEVICE if implementation_in_force() == "triton" else torch.device("cpu")
    unet = unet.to(device, memory_format=memory_format)
    x = x.to(device).contiguous(memory_format=memory_format).requires_grad_()
    words, condition = ({k: v.to(device) for k, v in given.items()} for given in (words, condition))
    out = unet(x, time.to(device), **condition, **words)
    assert memory_format == torch.contiguous_format or out.is_contiguous(memory_format=memory_format)
    assert_close(out.detach().cpu(), golden["forward"], 1e-4)
    (out * fill(f"{short}/cotangent", out.shape).to(out)).sum().backward()
    assert_close(x.grad.cpu(), golden["grad_x"], 1e-4)

    expected = config["parameter_gradients_norm_and_projection"]
    without = set(config["parameters_without_gradient"])
    assert {key for key, _ in unet.named_parameters()} == set(expected) | without
    for key, parameter in unet.named_parameters():
        if key in without:
            assert parameter.grad is None, key
            continue
        norm, projection = expected[key]
        gradient = parameter.grad.double().cpu()
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-4), key
        # A projection is a sum of many terms of either sign: its error scales with the gradient's norm.
        actual = (gradient * fill(f"grad/{key}", gradient.shape).double()).sum().item()
        assert actual == pytest.approx(projection, abs=1e-3 + 1e-4 * norm * gradient.numel() ** 0.5), key
    return {key: gradient.cpu() for key, gradient in _gradients(unet, x).items()}


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_diffusion(name):
    golden = arrays(name)
    diffusion = GaussianDiffusion(timesteps=int(name.removeprefix("diffusion_")))
    checked = 0
    for key, value in golden.items():
        if key.startswith("buffer_"):
            assert_close(getattr(diffusion, key.removeprefix("buffer_")), value, 1e-6)
            checked += 1
    assert checked == len(list(diffusion.buffers()))

    x_start, x_t, noise = (fill(f"diffusion/{key}", (4, 3, 8, 8)) for key in ("x_start", "x_t", "noise"))
    t = golden["t"]
    answers = {
        "q_sample": diffusion.q_sample(x_start, t, noise),
        "predict_start_from_noise": diffusion.predict_start_from_noise(x_t, t, noise),
    }
    answers |= zip(
        ("posterior_mean", "posterior_variance", "posterior_log_variance_clipped"),
        diffusion.q_posterior(x_start, x_t, t),
        strict=True,
    )
    for key, value in answers.items():
        assert_close(value, golden[key], 1e-5)


@pytest.mark.parametrize("key", sorted(arrays("resize")))
def test_resize(key):
    old, new = (int(size) for size in key.removesuffix("_clamped").split("_to_"))
    image = fill(f"resize/{old}", (2, 3, old, old), 0.25, 0.5)
    clamp_range = (0, 1) if key.endswith("_clamped") else None
    assert_close(resize_image_to(image, new, clamp_range=clamp_range), arrays("resize")[key], 1e-5)


def _imagen_case(name):
    config, golden = load(name)
    places = enumerate(config["unets"])
    unets = [Unet(**{**unet, "lowres_cond": place > 0}) for place, unet in places]
    imagen = Imagen(unets, text_encoder_name="t5_small", image_sizes=config["image_sizes"], **config["imagen"])
    for unet in imagen.unets:
        set_weights(unet)
    embeds, mask = text(f"{name.removeprefix('imagen_')}/text_embeds", config["batch"], config["words"], 512)
    return imagen, config, golden, name.removeprefix("imagen_"), {"text_embeds": embeds, "text_masks": mask}


@pytest.mark.parametrize("name", IMAGENS)
def test_imagen_state_dict(name):
    imagen, config, *_ = _imagen_case(name)
    shapes = {key: list(value.shape) for key, value in imagen.state_dict().items()}
    assert list(shapes.items()) == list(config["state_dict"].items())


@pytest.mark.parametrize("name", IMAGENS)
def test_imagen_losses(name, implementation):
    imagen, config, golden, short, words = _imagen_case(name)
    side = config["image_sizes"][-1] + 8
    images = fill(f"{short}/images", (config["batch"], 3, side, side), 0.2, 0.5).clamp(0, 1)
    for number in range(1, len(imagen.unets) + 1):
        torch.manual_seed(config["seed"])
        loss = imagen(images, **words, unet_number=number)
        assert_close(loss.detach(), golden[f"loss_unet_{number}"].reshape(()), 1e-5)


@pytest.mark.parametrize("name", IMAGENS)
def test_imagen_samples(name, implementation):
    imagen, config, golden, _, words = _imagen_case(name)
    torch.manual_seed(config["seed"])
    images = imagen.sample(**words, cond_scale=config["cond_scale"], match_original=True, progress=False)
    assert_close(images, golden["sample"], 1e-4)


@pytest.mark.parametrize("name", IMAGENS)
def test_sampling_step(name, implementation):
    imagen, _, golden, short, _ = _imagen_case(name)
    schedule = imagen.noise_schedulers[0]
    x, t = fill(f"{short}/p_x", (2, 3, 8, 8)), torch.tensor([3, 17])
    constants = (
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_log_variance_clipped",
    )

    def step(noise):
        return ancestral_step(
            x,
            t,
            fill(f"{short}/p_noise", x.shape, 1.5),
            noise,
            *(getattr(schedule, constant) for constant in constants),
            percentile=imagen.dynamic_thresholding_percentile,
        )

    assert_close(step(torch.zeros_like(x)), golden["p_mean"], 1e-5)
    noise = fill("sampling step/noise", x.shape)
    assert_close(step(noise), golden["p_mean"] + (0.5 * golden["p_log_variance"]).exp() * noise, 1e-5)
    assert_close(schedule.q_posterior(x, x, t)[1], golden["p_variance"], 1e-5)
