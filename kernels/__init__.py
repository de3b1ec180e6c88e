"""Operations that run in more than one implementation. Import as ``minimagen_fast.kernels``.

The kernels have first derivatives in reverse mode: those of ``backward()`` and ``torch.autograd.grad``. Gradients of
gradients, derivatives in forward mode (``torch.func.jvp``, ``torch.autograd.forward_ad``) or by other transforms of
``torch.func``, and batched ones (``is_grads_batched``, ``vectorize``) raise a NotImplementedError. In plain torch they
exist: choose it by ``use_implementation("reference")``.
"""

# From a checkout's root this folder can also be imported as ``kernels``, and transformers does so when it looks for a
# package of that name. That copy stays empty: every operation exists, and is registered, once.
if __name__ != "kernels":
    from .attention import null_key_attention
    from .channel_norm import channel_layer_norm
    from .conv1x1_concat import conv1x1_concat
    from .cpu_products import linear
    from .cross_attention import null_key_cross_attention
    from .diffusion import predict_start_from_noise, q_posterior_mean, q_sample
    from .dispatch import implementation, use_implementation
    from .group_norm_silu import group_norm_silu
    from .row_norm import layer_norm
    from .sampling_step import ancestral_step, ddim_step, dpm_solver_pp_2m_step
    from .upsample_conv import upsample_conv3x3
    from .wide_conv import wide_conv2d

    __all__ = [
        "ancestral_step",
        "channel_layer_norm",
        "conv1x1_concat",
        "ddim_step",
        "dpm_solver_pp_2m_step",
        "group_norm_silu",
        "implementation",
        "layer_norm",
        "linear",
        "null_key_attention",
        "null_key_cross_attention",
        "predict_start_from_noise",
        "q_posterior_mean",
        "q_sample",
        "upsample_conv3x3",
        "use_implementation",
        "wide_conv2d",
    ]
