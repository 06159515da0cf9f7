"""FluxAttnProcessor for training on a CPU: the same sums in bfloat16 with fewer passes over memory.

Rotations stay in the working precision, and attention over 80 tokens is two batched products. Only the training uses it.
"""

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention


def rotated(x_BSHC: torch.Tensor, cos_SC: torch.Tensor, sin_SC: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of interleaved pairs; `cos_SC`, `sin_SC` repeat each angle twice."""
    even_cos, even_sin = cos_SC[:, None, ::2], sin_SC[:, None, ::2]
    even, odd = x_BSHC[..., ::2], x_BSHC[..., 1::2]
    return torch.stack((even * even_cos - odd * even_sin, odd * even_cos + even * even_sin), dim=-1).flatten(-2)


class FastAttention:
    """Same call and result as FluxAttnProcessor, without masks."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        heads = (-1, attn.head_dim)
        query, key = attn.to_q(hidden_states).unflatten(-1, heads), attn.to_k(hidden_states).unflatten(-1, heads)
        value = attn.to_v(hidden_states).unflatten(-1, heads)
        query, key = normed(query, attn.norm_q), normed(key, attn.norm_k)
        text_tokens = 0
        if encoder_hidden_states is not None:
            text_tokens = encoder_hidden_states.shape[1]
            text_query = normed(attn.add_q_proj(encoder_hidden_states).unflatten(-1, heads), attn.norm_added_q)
            text_key = normed(attn.add_k_proj(encoder_hidden_states).unflatten(-1, heads), attn.norm_added_k)
            text_value = attn.add_v_proj(encoder_hidden_states).unflatten(-1, heads)
            query, key = torch.cat([text_query, query], 1), torch.cat([text_key, key], 1)
            value = torch.cat([text_value, value], 1)
        cos, sin = (part.to(query.dtype) for part in image_rotary_emb)
        query, key = rotated(query, cos, sin).transpose(1, 2), rotated(key, cos, sin).transpose(1, 2)
        weight = torch.softmax(query @ key.transpose(2, 3) * attn.head_dim**-0.5, dim=-1).to(value.dtype)
        out = (weight @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        return attn.to_out[0](out[:, text_tokens:]), attn.to_add_out(out[:, :text_tokens])


def normed(x_BSHC: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    """RMS norm over the channels of a head, in the working precision."""
    return torch.nn.functional.rms_norm(x_BSHC, (x_BSHC.shape[-1],), norm.weight.to(x_BSHC.dtype), norm.eps)
