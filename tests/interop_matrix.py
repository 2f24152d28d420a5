"""The matrix of formats, schemes and loaders, as data: what is written, what reads it, and for which models."""

from __future__ import annotations

from typing import NamedTuple

LANGUAGE = ("llama", "qwen2")
MIXTURE, ENCODER = "mixtral", "minilm"


class Row(NamedTuple):
    """One way to write a checkpoint.

    loaders: names in `real_loaders.LOADERS`, of models with one matrix per projection
    experts, encoder: the loaders of a mixture of experts and of BERT where they are others; () where there are none
    source: the dtype of the weights that are quantized
    dtype: in which the models compute
    options: of the format
    """

    format: str
    scheme: str
    loaders: tuple[str, ...]
    experts: tuple[str, ...] | None = None
    encoder: tuple[str, ...] | None = ()
    source: str = "float32"
    dtype: str = "float32"
    options: tuple[tuple[str, str], ...] = ()

    @property
    def id(self) -> str:
        """format-scheme-source, and the options."""
        return "-".join([self.format, self.scheme, self.source, *(f"{k}={v}" for k, v in self.options)])

    def of(self, model: str) -> tuple[str, ...]:
        """The loaders of one model."""
        own = {MIXTURE: self.experts, ENCODER: self.encoder}.get(model, self.loaders)
        return self.loaders if own is None else own


CT = "compressed-tensors"
# transformers holds the experts of a mixture in one tensor: it decodes some formats of compressed-tensors into it, and
# those of GPTQ, AWQ and bitsandbytes not. Asymmetric weights it takes only if it decodes them while it loads.
CT_ALL = ("transformers", "transformers-dequantize", CT)
CT_DECODED = ("transformers-dequantize", CT)
CT_INT8 = ("transformers-dequantize", "transformers-int8-activations", CT)
CT_FP8 = ("transformers-dequantize", "transformers-fp8-activations", CT)
GPTQ, AWQ = ("transformers-gptqmodel", "gptqmodel"), ("transformers-gptqmodel-awq", "gptqmodel-awq")
BNB, INT8 = ("transformers-bitsandbytes", "bitsandbytes"), ("transformers-llm.int8", "bitsandbytes")
MLX = ("mlx_lm", "mlx")
GGUF = ("llama.cpp", "transformers-gguf", "gguf")
GGUF_EXPERTS = ("llama.cpp", "gguf")  # transformers takes the file of a Mixtral for one of a Llama

# compressed-tensors decodes FP4 and MX formats to bfloat16, so the models compute in it.
HALF = {"source": "bfloat16", "dtype": "bfloat16"}
# GPTQ and AWQ have float16 scales, and their kernels compute in it.
FLOAT16 = {"source": "bfloat16", "dtype": "float16"}
DYNAMIC, DOUBLE = (("activations", "dynamic"),), (("double_quant", "true"),)
V2 = (("checkpoint_format", "gptq_v2"),)

ROWS: tuple[Row, ...] = (
    Row(CT, "int4_g128", CT_ALL, encoder=CT_ALL),
    Row(CT, "int4_g128", CT_ALL, **HALF),
    Row(CT, "int4_channel", CT_ALL),
    Row(CT, "int4_g128_asym", CT_DECODED, experts=(CT,), encoder=CT_DECODED),
    Row(CT, "int8_g128", CT_ALL),
    Row(CT, "int8_channel", CT_ALL, encoder=CT_ALL),
    Row(CT, "int2_g64", CT_ALL),
    Row(CT, "int8_channel", CT_INT8, experts=(CT,), options=DYNAMIC),
    Row(CT, "e4m3_tensor", CT_ALL),
    Row(CT, "e4m3_channel", CT_ALL, encoder=CT_ALL),
    Row(CT, "e4m3_channel", CT_FP8, experts=(CT,), options=DYNAMIC),
    Row(CT, "e4m3_b128", CT_DECODED, experts=(CT,)),
    Row(CT, "nvfp4", CT_ALL, experts=(CT,), encoder=CT_ALL, **HALF),
    Row(CT, "mxfp4", CT_ALL, encoder=CT_ALL, **HALF),
    Row(CT, "mxfp8", CT_ALL, experts=(CT,), encoder=CT_ALL, **HALF),
    Row("gptq", "int4_g128", GPTQ, experts=("gptqmodel",), encoder=GPTQ, **FLOAT16),
    Row("gptq", "int4_g128", GPTQ, experts=("gptqmodel",), options=V2, **FLOAT16),
    Row("gptq", "int4_g32_asym", GPTQ, experts=("gptqmodel",), options=V2, **FLOAT16),
    Row("gptq", "int8_g128", GPTQ, experts=("gptqmodel",), **FLOAT16),
    Row("gptq", "int3_g128", GPTQ, experts=("gptqmodel",), **FLOAT16),
    Row("gptq", "int2_g64", GPTQ, experts=("gptqmodel",), **FLOAT16),
    Row("gptq", "int4_channel", GPTQ, experts=("gptqmodel",), **FLOAT16),
    Row("awq", "int4_g128_asym", AWQ, experts=("gptqmodel-awq",), encoder=AWQ, **FLOAT16),
    Row("awq", "int4_g64_asym", AWQ, experts=("gptqmodel-awq",), **FLOAT16),
    Row("awq", "int4_g128", AWQ, experts=("gptqmodel-awq",), **FLOAT16),
    Row("bitsandbytes", "nf4_g64", BNB, experts=("bitsandbytes",), encoder=BNB),
    Row("bitsandbytes", "fp4_g64", BNB, experts=("bitsandbytes",)),
    Row("bitsandbytes", "nf4_g64", BNB, experts=("bitsandbytes",), encoder=BNB, options=DOUBLE),
    Row("bitsandbytes", "int8_channel", INT8, experts=("bitsandbytes",), encoder=INT8),
    Row("fp8", "e4m3_b128", ("transformers",), encoder=("transformers",)),
    Row("modelopt", "nvfp4", ("modelopt",), encoder=("modelopt",)),
    Row("comfyui", "e4m3_tensor", ("comfy_kitchen",), encoder=("comfy_kitchen",)),
    Row("comfyui", "e4m3_tensor", ("comfy_kitchen",), options=(("layout", "quantization_metadata"),)),
    Row("mlx", "affine4_g64", MLX, encoder=("mlx",)),
    *(Row("mlx", f"affine{bits}_g64", MLX) for bits in (2, 3, 5, 6, 8)),
    Row("mlx", "affine4_g32", MLX),
    Row("mlx", "affine4_g128", MLX),
    Row("mlx", "mxfp4", MLX),
    Row("mlx", "nvfp4_local", MLX),
    *(
        Row("gguf", scheme, GGUF, experts=GGUF_EXPERTS, encoder=GGUF_EXPERTS if scheme in ("f16", "q8_0") else ())
        for scheme in ("f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4", "nvfp4")
    ),
    *(Row("gguf", scheme, GGUF, experts=GGUF_EXPERTS) for scheme in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")),
    Row("gguf", "q4_k_m", GGUF, experts=GGUF_EXPERTS, encoder=GGUF_EXPERTS),
    Row("gguf", "q5_k_m", GGUF, experts=GGUF_EXPERTS),
    Row("gguf", "q4_k_m", GGUF, experts=GGUF_EXPERTS, source="bfloat16"),
)
