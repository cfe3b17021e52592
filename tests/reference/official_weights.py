"""Official checkpoint folders in NumPy: written at random, and read slowly into our layout.

Names and shapes are those of the released weights (README_WEIGHTS.md beside them) and of
modeling_deepseek.py there, written down once more: nothing here comes from our name tables.
"""

import json

import ml_dtypes
import numpy as np
import safetensors.numpy
from reference.tensor_files import package_read

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
COPIES = {  # in an MTP layer
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}
# Sizes are distinct; 8 devices divide a dim of every matrix, into parts that are no blocks of 128.
FIELDS = {
    "model_type": "deepseek_v3",
    "vocab_size": 328,
    "hidden_size": 136,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 280,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 132,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "moe_intermediate_size": 44,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}


def layer_shapes(f: dict, dense: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer: [out, in], as torch has them."""
    width, heads, rank = f["hidden_size"], f["num_attention_heads"], f["kv_lora_rank"]
    nope, rope, value = (f[n] for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    out = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.kv_a_proj_with_mqa.weight": (rank + rope, width),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (heads * (nope + value), rank),
        "self_attn.o_proj.weight": (width, heads * value),
    }
    if (q_rank := f["q_lora_rank"]) is None:
        out["self_attn.q_proj.weight"] = (heads * (nope + rope), width)
    else:
        out["self_attn.q_a_proj.weight"] = (q_rank, width)
        out["self_attn.q_a_layernorm.weight"] = (q_rank,)
        out["self_attn.q_b_proj.weight"] = (heads * (nope + rope), q_rank)
    hidden, n_experts = f["moe_intermediate_size"], f["n_routed_experts"]
    ffns = {"mlp.": f["intermediate_size"]}
    if not dense:
        out["mlp.gate.weight"] = (n_experts, width)
        out["mlp.gate.e_score_correction_bias"] = (n_experts,)
        ffns = {f"mlp.experts.{expert}.": hidden for expert in range(n_experts)}
        if f["n_shared_experts"]:
            ffns["mlp.shared_experts."] = f["n_shared_experts"] * hidden
    for name, size in ffns.items():
        out[name + "gate_proj.weight"] = out[name + "up_proj.weight"] = (size, width)
        out[name + "down_proj.weight"] = (width, size)
    return out


def shapes(f: dict, copies: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, without scales."""
    width, n_layers = f["hidden_size"], f["num_hidden_layers"]
    table = (f["vocab_size"], width)
    out = {"model.embed_tokens.weight": table, "model.norm.weight": (width,)}
    out["lm_head.weight"] = table
    for i in range(n_layers + f["num_nextn_predict_layers"]):
        prefix, dense = f"model.layers.{i}.", i < min(f["first_k_dense_replace"], n_layers)
        inner = layer_shapes(f, dense)
        if i >= n_layers:
            inner |= {"enorm.weight": (width,), "hnorm.weight": (width,)}
            inner |= {"eh_proj.weight": (width, 2 * width), "shared_head.norm.weight": (width,)}
            if copies:
                inner |= {"embed_tokens.weight": table, "shared_head.head.weight": table}
        out |= {prefix + name: shape for name, shape in inner.items()}
    return out


def is_quantized(name: str) -> bool:
    """Whether the release holds the tensor in FP8."""
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and "eh_proj" not in name


def random_tensors(f: dict, kind: str = "F32", copies: bool = True) -> dict[str, np.ndarray]:
    """A checkpoint's tensors; kind is "F32", "BF16" or "F8_E4M3" (as in the release)."""
    rng = np.random.default_rng(7)
    out = {}
    for name, shape in shapes(f, copies).items():
        value = rng.normal(size=shape).astype(np.float32)
        if name.endswith("e_score_correction_bias"):
            out[name] = value
        elif kind == "F8_E4M3" and is_quantized(name):
            bits = rng.integers(0, 127, shape) + 128 * rng.integers(0, 2, shape)  # no NaN
            out[name] = bits.astype(np.uint8).view(DTYPES[kind])
            blocks = [-(-size // 128) for size in shape]
            out[name + "_scale_inv"] = (10.0 ** rng.uniform(-5, -1, blocks)).astype(np.float32)
        else:
            out[name] = value.astype(DTYPES["F32" if kind == "F32" else "BF16"])
        if repeated := COPIES.get(".".join(name.split(".")[3:])):
            out[name] = out[repeated]
    return out


def write(folder, f: dict, tensors: dict[str, np.ndarray], n_files: int = 1):
    """Dealt to files in turn, so that a layer and its scales lie in different ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(f))
    files = [f"model-{i + 1:05}-of-{n_files:05}.safetensors" for i in range(n_files)]
    weight_map = {name: files[i % n_files] for i, name in enumerate(tensors)}
    if n_files == 1:
        weight_map = dict.fromkeys(tensors, "model.safetensors")
    for file in set(weight_map.values()):
        held = {name: tensors[name] for name in tensors if weight_map[name] == file}
        safetensors.numpy.save_file(held, folder / file)
    if n_files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def raw(folder) -> dict[str, np.ndarray]:
    """Every tensor as it lies in the files, read by the safetensors package."""
    found = package_read(folder).items()
    return {
        name: np.frombuffer(data, DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape, data) in found
    }


def dequantized(folder) -> dict[str, np.ndarray]:
    """Every tensor in float32, without the scales."""
    tensors = raw(folder)
    out = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        out[name] = value.astype(np.float32)
        if name + "_scale_inv" in tensors:
            for (i, j), scale in np.ndenumerate(tensors[name + "_scale_inv"]):
                out[name][128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale
    return out


def our_layer(tensors: dict[str, np.ndarray], i: int, n_experts: int | None) -> dict:
    """One layer's parameters: matrices are [in, out], gate and up side by side."""

    def of(name):
        return tensors[f"model.layers.{i}.{name}"].T

    def gate_up(ffn):
        return np.concatenate([of(ffn + "gate_proj.weight"), of(ffn + "up_proj.weight")], axis=1)

    out = {
        "attention_norm.scale": of("input_layernorm.weight"),
        "ffn_norm.scale": of("post_attention_layernorm.weight"),
        "attention.kv_down.kernel": of("self_attn.kv_a_proj_with_mqa.weight"),
        "attention.kv_norm.scale": of("self_attn.kv_a_layernorm.weight"),
        "attention.kv_up.kernel": of("self_attn.kv_b_proj.weight"),
        "attention.out.kernel": of("self_attn.o_proj.weight"),
    }
    if f"model.layers.{i}.self_attn.q_proj.weight" in tensors:
        out["attention.q_up.kernel"] = of("self_attn.q_proj.weight")
    else:
        out["attention.q_down.kernel"] = of("self_attn.q_a_proj.weight")
        out["attention.q_norm.scale"] = of("self_attn.q_a_layernorm.weight")
        out["attention.q_up.kernel"] = of("self_attn.q_b_proj.weight")
    if n_experts is None:
        out["ffn.gate_up.kernel"] = gate_up("mlp.")
        return out | {"ffn.down.kernel": of("mlp.down_proj.weight")}
    out["ffn.router"] = of("mlp.gate.weight")
    out["ffn.bias"] = of("mlp.gate.e_score_correction_bias")
    experts = [f"mlp.experts.{expert}." for expert in range(n_experts)]
    out["ffn.gate_up"] = np.stack([gate_up(expert) for expert in experts])
    out["ffn.down"] = np.stack([of(expert + "down_proj.weight") for expert in experts])
    if f"model.layers.{i}.mlp.shared_experts.up_proj.weight" in tensors:
        out["ffn.shared.gate_up.kernel"] = gate_up("mlp.shared_experts.")
        out["ffn.shared.down.kernel"] = of("mlp.shared_experts.down_proj.weight")
    return out


def our_arrays(folder, dtype: str = "float32") -> dict[str, np.ndarray]:
    """What our model holds of a folder, by dotted path; rounded once if `dtype` is bfloat16."""
    f, tensors = json.loads((folder / "config.json").read_text()), dequantized(folder)
    n_layers = f["num_hidden_layers"]
    n_dense = min(f["first_k_dense_replace"], n_layers)
    out = {
        "embedding": tensors["model.embed_tokens.weight"],
        "norm.scale": tensors["model.norm.weight"],
        "head": tensors["lm_head.weight"],
    }
    stacks = {"dense": range(n_dense), "moe": range(n_dense, n_layers)}
    stacks["mtp"] = range(n_layers, n_layers + f["num_nextn_predict_layers"])
    for stack, numbers in stacks.items():
        n_experts = None if stack == "dense" else f["n_routed_experts"]
        layers = [our_layer(tensors, i, n_experts) for i in numbers]
        if stack == "mtp":
            layers = [mtp_layer(tensors, i, x) for i, x in zip(numbers, layers, strict=True)]
        for path in layers[0] if layers else ():
            out[f"{stack}.{path}"] = np.stack([layer[path] for layer in layers])
    return {path: value.astype(format_of(path, dtype)) for path, value in out.items()}


def mtp_layer(tensors: dict[str, np.ndarray], i: int, block: dict) -> dict:
    out = {f"block.{path}": value for path, value in block.items()}
    out["embedding_norm.scale"] = tensors[f"model.layers.{i}.enorm.weight"]
    out["hidden_norm.scale"] = tensors[f"model.layers.{i}.hnorm.weight"]
    out["join.kernel"] = tensors[f"model.layers.{i}.eh_proj.weight"].T
    return out | {"norm.scale": tensors[f"model.layers.{i}.shared_head.norm.weight"]}


def format_of(path: str, dtype: str) -> np.dtype:
    """Norms, router, balance bias and the embedding table stay float32."""
    wide = path == "embedding" or path.endswith((".scale", ".router", ".bias"))
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" and not wide else np.float32)
