"""Operations that run in more than one implementation. Import as ``minimagen_fast.kernels``."""

from .attention import null_key_attention
from .dispatch import implementation, use_implementation

__all__ = ["implementation", "null_key_attention", "use_implementation"]
