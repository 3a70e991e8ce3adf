"""Decoders of Conditional DETR and DAB-DETR: content and position have projections of their own.

A head's query is the sum of a content's and a position's projection (in cross-attention, a second
position's stands beside it), so a change of a head's basis would have to change all of them: the
blocks are not permutable, as these tensors are unknown to the pattern. Names of transformers, and
of the authors' own code (`sa_qcontent_proj`).
"""

from tiedconv.families._patterns import Attention, Linear, pattern_family

_LAYER = r"(?:.*\.)?layers\.(?P<n>\d+)"


def _hf(at: str) -> tuple[Attention, Linear]:
    names = {
        f"{at}.{role}": f"{at}.{role}_proj.weight" for role in ("q_pos", "k_pos", "q_pos_sine")
    }
    attention = Attention(
        _LAYER + rf"\.{at}", q="q_content_proj.weight", k="k_content_proj.weight",
        v="v_proj.weight", o="o_proj.weight",
    )  # fmt: skip
    return attention, Linear(_LAYER, names)


def _hf_dab(at: str) -> tuple[Attention, Linear]:
    words = {"q_pos": "query_pos", "k_pos": "key_pos", "q_pos_sine": "query_pos_sine"}
    names = {f"{at}.{role}": f"{at}.{at}_{word}_proj.weight" for role, word in words.items()}
    attention = Attention(
        _LAYER + rf"\.{at}", q=f"{at}_query_content_proj.weight",
        k=f"{at}_key_content_proj.weight", v=f"{at}_value_proj.weight",
        o=f"{at}.output_proj.weight",
    )  # fmt: skip
    return attention, Linear(_LAYER, names)


def _original(at: str, short: str) -> tuple[Attention, Linear]:
    words = {"q_pos": "qpos", "k_pos": "kpos", "q_pos_sine": "qpos_sine"}
    names = {f"{at}.{role}": f"{short}_{word}_proj.weight" for role, word in words.items()}
    attention = Attention(
        _LAYER, q=f"{short}_qcontent_proj.weight", k=f"{short}_kcontent_proj.weight",
        v=f"{short}_v_proj.weight", o=f"{at}.out_proj.weight", part=at,
    )  # fmt: skip
    return attention, Linear(_LAYER, names)


FAMILY = pattern_family(
    "conditional-detr",
    "model.decoder.layers.0.encoder_attn.q_content_proj.weight",
    *_hf("self_attn"),
    *_hf("encoder_attn"),
    *_hf_dab("self_attn"),
    *_hf_dab("cross_attn"),
    *_original("self_attn", "sa"),
    *_original("cross_attn", "ca"),
)
