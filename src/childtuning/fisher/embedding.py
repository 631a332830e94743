"""Tables of vectors. Shapes: B examples, T tokens, V rows, D width."""

from __future__ import annotations

from torch import Tensor, nn

from childtuning.fisher.gradients import ExampleGradients, Rows
from childtuning.fisher.rules import UnsupportedLayerError, rule


@rule(nn.Embedding)
def embedding(module: nn.Embedding, x: Tensor, dY: Tensor) -> dict[str, ExampleGradients]:
    """weight [V, D]: ``einsum('btv,btd->bvd', onehot(x), dY)``, without the row ``padding_idx``.

    Hugging Face's scaled word embeddings, as Gemma and BART have them, multiply the rows by ``embed_scale``.
    """
    if module.scale_grad_by_freq or module.max_norm is not None:
        raise UnsupportedLayerError("scale_grad_by_freq and max_norm have no rule")
    values = dY.reshape(len(dY), -1, module.embedding_dim) * getattr(module, "embed_scale", 1.0)
    return {
        "weight": Rows(
            x.flatten(1) if x.dim() > 1 else x.unsqueeze(1), values, module.num_embeddings, module.padding_idx
        )
    }
