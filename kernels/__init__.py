"""Operations that run in more than one implementation. Import as ``minimagen_fast.kernels``."""

# From a checkout's root this folder can also be imported as ``kernels``, and transformers does so when it looks for a
# package of that name. That copy stays empty: every operation exists, and is registered, once.
if __name__ != "kernels":
    from .attention import null_key_attention, null_key_cross_attention
    from .dispatch import implementation, use_implementation

    __all__ = ["implementation", "null_key_attention", "null_key_cross_attention", "use_implementation"]
