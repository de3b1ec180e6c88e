"""Every family of kernels under autocast: activations in half precision, parameters and their gradients in float32."""

import pytest
import torch
import torch.nn.functional as F
from kernel_parity import DEVICE, SHARE_OF_NORM, randn

from minimagen_fast.diffusion_model import GaussianDiffusion
from minimagen_fast.kernels import (
    ancestral_step,
    channel_layer_norm,
    conv1x1_concat,
    ddim_step,
    dpm_solver_pp_2m_step,
    group_norm_silu,
    layer_norm,
    null_key_attention,
    null_key_cross_attention,
    q_sample,
    upsample_conv3x3,
    use_implementation,
)

B, HEADS, D, DIM = 2, 2, 32, 64


def _images():
    return {"x": randn("x", B, 8, 4, 4), "project": randn("project", DIM, 8, 1, 1)}


def _tokens():
    return {"x": randn("x", B, 9, DIM), "project": randn("project", DIM, DIM, scale=DIM**-0.5)}


def _null():
    return {name: randn(name, D) for name in ("null_key", "null_value")}


def _group_norm_silu(x, project, time, to_scale_shift, weight, bias):
    x, (scale, shift) = F.conv2d(x, project), F.linear(time, to_scale_shift).chunk(2, dim=1)
    return group_norm_silu(x, weight, bias, groups=8, scale=scale, shift=shift, skip=x.flip(0))


def _layer_norm(x, project, gain):
    return layer_norm(F.linear(x, project), gain)


def _layer_norm_of_a_float32_stream(x, project, gain):
    return layer_norm(F.linear(x, project), gain, residual=x)


def _channel_layer_norm(x, project, gain):
    return channel_layer_norm(F.conv2d(x, project), gain, gelu=True)


def _attention(x, project, null_key, null_value):
    q = F.linear(x, project)
    return null_key_attention(q, q.flip(1), q, null_key, null_value, heads=HEADS)


def _attention_with_shared_keys(x, project, null_key, null_value):
    q = F.linear(x, project)
    return null_key_attention(q, *q.flip(1).chunk(2, dim=-1), null_key, null_value, heads=HEADS)


def _attention_with_values_in_float32(x, project, null_key, null_value):
    q = F.linear(x, project)
    return null_key_attention(q, q.flip(1), x, null_key, null_value, heads=HEADS)


def _attention_in_float32(x, project, null_key, null_value):
    return null_key_attention(x, F.linear(x, project).float(), x.flip(1), null_key, null_value, heads=HEADS)


def _cross_attention(x, project, null_key, null_value):
    to_kv = torch.cat((project.flip(0), project.flip(1)))
    return null_key_cross_attention(x, x[:, :5], project, to_kv, project, null_key, null_value, heads=HEADS)


def _conv1x1_concat(x, project, weight, bias):
    x = F.conv2d(x, project)
    return conv1x1_concat(x, x.flip(0), weight, bias)


def _upsample_conv3x3(x, project, weight, bias):
    return upsample_conv3x3(F.conv2d(x, project), weight, bias)


def _affine():
    return {name: randn(name, 2 * DIM) for name in ("weight", "bias")}


def _time():
    return {"time": randn("time", B, 8), "to_scale_shift": randn("to_scale_shift", 4 * DIM, 8, scale=0.1)}


# What a family is given, all in float32.
FAMILIES = {
    _group_norm_silu: lambda: _images() | _time() | _affine(),
    _layer_norm: lambda: _tokens() | {"gain": randn("gain", DIM)},
    _layer_norm_of_a_float32_stream: lambda: _tokens() | {"gain": randn("gain", DIM)},
    _channel_layer_norm: lambda: _images() | {"gain": randn("gain", DIM)},
    _attention: lambda: _tokens() | _null(),
    _attention_with_shared_keys: lambda: _tokens() | _null(),
    _attention_with_values_in_float32: lambda: _tokens() | _null(),
    _attention_in_float32: lambda: _tokens() | _null(),
    _cross_attention: lambda: _tokens() | _null(),
    _upsample_conv3x3: lambda: _images() | {"weight": randn("w", 16, DIM, 3, 3), "bias": randn("bias", 16)},
    _conv1x1_concat: lambda: _images() | {"weight": randn("w", 16, 2 * DIM, 1, 1), "bias": randn("bias", 16)},
}


def _outcome(family, name, dtype=None):
    """The output and the gradients by name, under autocast to ``dtype`` if there is one."""
    inputs = {key: x.requires_grad_() for key, x in FAMILIES[family]().items()}
    autocast = torch.autocast(DEVICE.type, dtype, enabled=dtype is not None)
    with use_implementation(name), autocast:
        out = family(**inputs)
    # Backward passes run outside of autocast.
    out.backward(randn("cotangent", *out.shape).to(out.dtype))
    return {"output": out.detach()} | {key: x.grad for key, x in inputs.items()}


@pytest.mark.parametrize("dtype", SHARE_OF_NORM)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__[1:])
def test_dtypes_and_values(family, dtype):
    actual, plain = (_outcome(family, name, dtype) for name in ("triton", "reference"))
    dtypes = {name: x.dtype for name, x in actual.items()}
    assert dtypes == {name: x.dtype for name, x in plain.items()}
    assert dtypes.pop("output") == (torch.float32 if family is _layer_norm_of_a_float32_stream else dtype)
    assert set(dtypes.values()) == {torch.float32}
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        return  # The interpreter cuts bfloat16 off, and its products of it are wrong.
    exact = _outcome(family, "reference")
    for name, x in actual.items():
        assert (x.float() - exact[name]).norm() < SHARE_OF_NORM[dtype] * exact[name].norm(), name


@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("dtype", SHARE_OF_NORM)
def test_images_on_their_way_stay_in_float32(name, dtype):
    process, t = GaussianDiffusion(timesteps=20).to(DEVICE), torch.tensor([3, 19], device=DEVICE)
    x, noise = randn("x", B, 3, 4, 4), randn("noise", B, 3, 4, 4)
    alphas = process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod
    posterior = process.posterior_mean_coef1, process.posterior_mean_coef2, process.posterior_log_variance_clipped
    inverse = process.sqrt_recip_alphas_cumprod, process.sqrt_recipm1_alphas_cumprod
    with use_implementation(name), torch.autocast(DEVICE.type, dtype):
        prediction = F.conv2d(x, randn("project", 3, 3, 1, 1))
        results = [
            q_sample(x, t, noise, *alphas),
            ancestral_step(x, t, prediction, noise, *inverse, *posterior, percentile=0.9),
            ddim_step(x, t, t // 2, prediction, *alphas, percentile=0.9),
            *dpm_solver_pp_2m_step(x, t, t // 2, prediction, *alphas, percentile=0.9),
        ]
    assert prediction.dtype == dtype
    assert {result.dtype for result in results} == {torch.float32}
