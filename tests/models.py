"""The zoo: tiny random transformers of every kind, from their own classes, dressed like trained ones, with their inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

Inputs = dict[str, Any]


# ---- inputs: each is a batch of two, the same at every call ---------------------------------------------------------
def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def words() -> Inputs:
    """input_ids [2, 12] in 3..99 and an attention mask whose second row ends in three pads."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {"input_ids": torch.randint(3, 100, (2, 12), generator=_generator()), "attention_mask": mask}


def unmasked_words() -> Inputs:
    """The same without a mask."""
    return {"input_ids": words()["input_ids"]}


def two_texts() -> Inputs:
    """What an encoder-decoder reads: ``words`` and decoder_input_ids [2, 7]."""
    return {**words(), "decoder_input_ids": torch.randint(3, 100, (2, 7), generator=_generator())}


def pixels() -> Inputs:
    """pixel_values [2, 3, 32, 32], standard normal."""
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=_generator())}


def words_and_pixels() -> Inputs:
    """A text and an image each, for two-tower models."""
    return {**words(), **pixels()}


def image_tokens(count: int = 16) -> Inputs:
    """A language model's sequence [2, count + 12] that begins with image tokens (id 100), and the images."""
    ids = torch.cat([torch.full((2, count), 100), words()["input_ids"]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels()}


def few_image_tokens() -> Inputs:
    """``image_tokens`` for a model that shuffles 16 patches into 4 tokens."""
    return image_tokens(4)


def typed_image_tokens() -> Inputs:
    """``image_tokens`` and token_type_ids that are zero everywhere: all of it is read, none of it is to be written."""
    inputs = image_tokens()
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def image_tiles() -> Inputs:
    """``few_image_tokens`` with one tile per image: pixel_values [2, 1, 3, 32, 32]."""
    inputs = few_image_tokens()
    return {**inputs, "pixel_values": inputs["pixel_values"][:, None]}


def words_with_boxes() -> Inputs:
    """``words`` with bbox [2, 12, 4]: corners in 0..63."""
    corner = torch.randint(0, 32, (2, 12, 2), generator=_generator())
    return {**words(), "bbox": torch.cat([corner, corner + 16], -1)}


def frames() -> Inputs:
    """pixel_values [2, 4, 3, 32, 32]: four frames of video."""
    return {"pixel_values": torch.randn(2, 4, 3, 32, 32, generator=_generator())}


def mel_frames() -> Inputs:
    """input_features [2, 20, 32] and their mask."""
    features = torch.randn(2, 20, 32, generator=_generator())
    return {"input_features": features, "attention_mask": torch.ones(2, 20, dtype=torch.long)}


def past_values() -> Inputs:
    """past_values [2, 32, 3]: three series of 32 steps."""
    return {"past_values": torch.randn(2, 32, 3, generator=_generator())}


def wave() -> Inputs:
    """input_values [2, 800]: raw audio."""
    return {"input_values": torch.randn(2, 800, generator=_generator())}


def spectrogram() -> Inputs:
    """input_values [2, 32, 16]: time by mel bins."""
    return {"input_values": torch.randn(2, 32, 16, generator=_generator())}


def speech_and_text() -> Inputs:
    """input_features [2, 16, 40] (mel bins by time) and decoder_input_ids [2, 7]."""
    features = torch.randn(2, 16, 40, generator=_generator())
    return {"input_features": features, "decoder_input_ids": two_texts()["decoder_input_ids"]}


def speech_frames_and_text() -> Inputs:
    """input_features [2, 40, 16] (time by mel bins) and decoder_input_ids [2, 7]."""
    both = speech_and_text()
    return {**both, "input_features": both["input_features"].transpose(1, 2).contiguous()}


# ---- configurations: width 64, two layers, four heads ---------------------------------------------------------------
TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**TOKENS, **BODY, "max_position_embeddings": 64}
LLAMA = {**BERT, "num_key_value_heads": 2}
GEMMA = {**LLAMA, "head_dim": 16}
VIT = {**BODY, "image_size": 32, "patch_size": 8}
TOWER = {**BODY, "max_position_embeddings": 64, "vocab_size": 128}
BART = {
    **TOKENS, "decoder_start_token_id": 2, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
}  # fmt: skip
T5 = {**TOKENS, "decoder_start_token_id": 0, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
MOE = {**LLAMA, "num_experts_per_tok": 2}
AUDIO = {
    **BODY, "vocab_size": 32, "conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False,
}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


@dataclass(frozen=True)
class Architecture:
    """One row of the zoo. ``model`` is a class of transformers; ``config`` holds the fields of its own config class.

    >>> model, inputs = by_name("bert").build()
    >>> main_output(model(**inputs)).shape
    torch.Size([2, 12, 64])
    """

    name: str
    kind: str
    model: str
    config: Mapping[str, Any] = field(repr=False)
    inputs: Callable[[], Inputs] = field(repr=False)
    seed: int = 0  # of the weights

    def build(self, seed: int | None = None, dressed: bool = True) -> tuple[torch.nn.Module, Inputs]:
        """The model in eval mode (float32, no cache, the same weights for the same seed), and its inputs.

        ``dressed=False`` leaves the weights as transformers initialises them: gains of one, biases of zero.
        """
        cls = getattr(transformers, self.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed if seed is None else seed)
            config = cls.config_class(**self.config)
            for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
                if hasattr(part, "use_cache"):
                    part.use_cache = False
            model = cls(config).eval()
            if dressed:
                dress(model)
        return model, self.inputs()


@torch.no_grad()
def dress(model: torch.nn.Module) -> torch.nn.Module:
    """Give a freshly initialised model what training gives: weights of full size, biases, and gains with outlier channels.

    An untrained norm has gain one and bias zero, so that migrating its gain would be tested on the identity. In place.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and 0 < parameter.std() < 0.03:  # made for a width of thousands; ours is 64
            parameter.mul_(4)
        elif name.endswith("bias") and parameter.ndim == 1:
            parameter.add_(0.05 * torch.randn_like(parameter))
    for module in model.modules():
        gain = getattr(module, "weight", None)
        if "Norm" not in type(module).__name__ or not isinstance(gain, torch.nn.Parameter) or gain.ndim != 1:
            continue
        outliers = torch.ones_like(gain)
        outliers[torch.randperm(len(gain))[:2]] = torch.tensor([8.0, -5.0])[: len(gain)]
        wanted = outliers * torch.exp(0.2 * torch.randn_like(gain))
        gain.copy_(wanted - 1 if gain.abs().max() == 0 else wanted)  # some norms store the gain less one
    return model


def main_output(output: Any) -> torch.Tensor:
    """The tensor that a user came for: the logits, else the last hidden state, else the first floating tensor."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if isinstance(value := getattr(output, name, None), torch.Tensor):
            return value
    tensors = output.values() if isinstance(output, dict) else output
    return next(t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())


A = Architecture
ZOO: tuple[Architecture, ...] = (
    # encoders
    A("bert", "encoder", "BertModel", BERT, words),
    A("bert-classifier", "encoder", "BertForSequenceClassification", {**BERT, "num_labels": 3}, words),
    A("roberta", "encoder", "RobertaForMaskedLM", BERT, words),
    A("xlm-roberta", "encoder", "XLMRobertaModel", BERT, words),
    A("albert", "encoder", "AlbertModel", {**BERT, "embedding_size": 32}, words),
    A("distilbert", "encoder", "DistilBertModel", {**TOKENS, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}, words),
    A("electra", "encoder", "ElectraModel", {**BERT, "embedding_size": 32}, words),
    A("deberta", "encoder", "DebertaModel", {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, words),
    A("deberta-v2", "encoder", "DebertaV2Model",
      {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}, words),
    A("modernbert", "encoder", "ModernBertModel",
      {**BERT, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}, words),
    A("mpnet", "encoder", "MPNetModel", BERT, words),
    A("nomic-bert", "encoder", "NomicBertModel", BERT, words),
    A("roformer", "encoder", "RoFormerModel", {**BERT, "embedding_size": 64}, words),
    A("squeezebert", "encoder", "SqueezeBertModel", {**BERT, "embedding_size": 64}, words),
    A("convbert", "encoder", "ConvBertModel", {**BERT, "embedding_size": 64}, words),
    A("camembert", "encoder", "CamembertModel", BERT, words),
    A("mobilebert", "encoder", "MobileBertModel", {**BERT, "embedding_size": 32, "intra_bottleneck_size": 32}, words),
    A("fnet", "encoder", "FNetModel", BERT, unmasked_words),
    A("rembert", "encoder", "RemBertModel", {**BERT, "input_embedding_size": 32, "output_embedding_size": 64}, words),
    A("megatron-bert", "encoder", "MegatronBertModel", BERT, words),
    A("roberta-pre-norm", "encoder", "RobertaPreLayerNormModel", BERT, words),
    A("data2vec-text", "encoder", "Data2VecTextModel", BERT, words),
    A("esm", "encoder", "EsmModel", {**BERT, "position_embedding_type": "rotary", "mask_token_id": 4}, words),
    A("ernie", "encoder", "ErnieModel", BERT, words),
    A("bert-generation", "encoder", "BertGenerationEncoder", BERT, words),
    A("xlnet", "encoder", "XLNetModel", {**TOKENS, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}, words),
    A("flaubert", "encoder", "FlaubertModel", {**TOKENS, "emb_dim": 64, "n_layers": 2, "n_heads": 4, "n_words": 128}, words),
    A("eurobert", "encoder", "EuroBertModel", LLAMA, words),
    A("splinter", "encoder", "SplinterModel", BERT, words),
    # decoders
    A("gpt2", "decoder", "GPT2LMHeadModel", {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, words),
    A("gpt-neo", "decoder", "GPTNeoForCausalLM",
      {**TOKENS, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
       "max_position_embeddings": 64, "window_size": 8}, words),
    A("gptj", "decoder", "GPTJForCausalLM",
      {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}, words),
    A("gpt-neox", "decoder", "GPTNeoXForCausalLM", BERT, words),
    A("gpt-bigcode", "decoder", "GPTBigCodeForCausalLM",
      {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, words),
    A("codegen", "decoder", "CodeGenForCausalLM",
      {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}, words),
    A("opt", "decoder", "OPTForCausalLM", {**BERT, "ffn_dim": 128, "word_embed_proj_dim": 64}, words),
    A("opt-post-norm", "decoder", "OPTForCausalLM",
      {**BERT, "ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, words),
    A("bloom", "decoder", "BloomForCausalLM", {**TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4}, words),
    A("mpt", "decoder", "MptForCausalLM", {**TOKENS, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, words),
    A("falcon", "decoder", "FalconForCausalLM", BERT, words),
    A("falcon-sequential", "decoder", "FalconForCausalLM",
      {**BERT, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}, words),
    A("llama", "decoder", "LlamaForCausalLM", LLAMA, words),
    A("llama-tied", "decoder", "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True}, words),
    A("mistral", "decoder", "MistralForCausalLM", {**LLAMA, "sliding_window": 8}, words),
    A("qwen2", "decoder", "Qwen2ForCausalLM", LLAMA, words),
    A("qwen3", "decoder", "Qwen3ForCausalLM", GEMMA, words),
    A("gemma", "decoder", "GemmaForCausalLM", GEMMA, words),
    A("gemma2", "decoder", "Gemma2ForCausalLM", {**GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 8}, words),
    A("gemma3", "decoder", "Gemma3ForCausalLM", {**GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 8}, words),
    A("phi", "decoder", "PhiForCausalLM", {**LLAMA, "num_key_value_heads": 4}, words),
    A("phi3", "decoder", "Phi3ForCausalLM", LLAMA, words),
    A("stablelm", "decoder", "StableLmForCausalLM", LLAMA, words),
    A("olmo", "decoder", "OlmoForCausalLM", LLAMA, words),
    A("olmo2", "decoder", "Olmo2ForCausalLM", LLAMA, words),
    A("cohere", "decoder", "CohereForCausalLM", LLAMA, words),
    A("cohere2", "decoder", "Cohere2ForCausalLM", {**LLAMA, "sliding_window": 8}, words),
    A("glm", "decoder", "GlmForCausalLM", GEMMA, words),
    A("glm4", "decoder", "Glm4ForCausalLM", GEMMA, words),
    A("smollm3", "decoder", "SmolLM3ForCausalLM", LLAMA, words),
    A("granite", "decoder", "GraniteForCausalLM", {**LLAMA, "residual_multiplier": 0.5, "logits_scaling": 2.0}, words),
    A("starcoder2", "decoder", "Starcoder2ForCausalLM", LLAMA, words),
    A("nemotron", "decoder", "NemotronForCausalLM", LLAMA, words),
    A("persimmon", "decoder", "PersimmonForCausalLM", BERT, words),
    A("helium", "decoder", "HeliumForCausalLM", GEMMA, words),
    A("biogpt", "decoder", "BioGptForCausalLM", BERT, words),
    A("xglm", "decoder", "XGLMForCausalLM",
      {**TOKENS, "d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64}, words),
    A("modernbert-decoder", "decoder", "ModernBertDecoderForCausalLM",
      {**BERT, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}, words),
    A("openai-gpt", "decoder", "OpenAIGPTLMHeadModel",
      {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, words),
    A("ctrl", "decoder", "CTRLLMHeadModel",
      {**TOKENS, "n_embd": 64, "dff": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}, words),
    A("olmo3", "decoder", "Olmo3ForCausalLM", {**LLAMA, "sliding_window": 8}, words),
    A("exaone4", "decoder", "Exaone4ForCausalLM", {**LLAMA, "sliding_window": 8}, words),
    A("arcee", "decoder", "ArceeForCausalLM", LLAMA, words),
    A("apertus", "decoder", "ApertusForCausalLM", LLAMA, words),
    A("diffllama", "decoder", "DiffLlamaForCausalLM", LLAMA, words),
    A("bitnet", "decoder", "BitNetForCausalLM", LLAMA, words),
    A("seed-oss", "decoder", "SeedOssForCausalLM", GEMMA, words),
    A("ernie4.5", "decoder", "Ernie4_5ForCausalLM", GEMMA, words),
    A("hunyuan", "decoder", "HunYuanDenseV1ForCausalLM", GEMMA, words),
    A("nanochat", "decoder", "NanoChatForCausalLM", LLAMA, words),
    A("trocr", "decoder", "TrOCRForCausalLM",
      {**TOKENS, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128,
       "cross_attention_hidden_size": 64,
       "max_position_embeddings": 64}, words),
    # encoder-decoders
    A("t5", "encoder-decoder", "T5ForConditionalGeneration", T5, two_texts),
    A("t5-gated", "encoder-decoder", "T5ForConditionalGeneration",
      {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, two_texts),
    A("umt5", "encoder-decoder", "UMT5ForConditionalGeneration", T5, two_texts),
    A("mt5", "encoder-decoder", "MT5ForConditionalGeneration", T5, two_texts),
    A("longt5", "encoder-decoder", "LongT5ForConditionalGeneration", {**T5, "local_radius": 3}, two_texts),
    A("bart", "encoder-decoder", "BartForConditionalGeneration", BART, two_texts),
    A("mbart", "encoder-decoder", "MBartForConditionalGeneration", BART, two_texts),
    A("marian", "encoder-decoder", "MarianMTModel", BART, two_texts),
    A("pegasus", "encoder-decoder", "PegasusForConditionalGeneration", BART, two_texts),
    A("m2m100", "encoder-decoder", "M2M100ForConditionalGeneration", BART, two_texts),
    A("blenderbot", "encoder-decoder", "BlenderbotForConditionalGeneration", BART, two_texts),
    A("blenderbot-small", "encoder-decoder", "BlenderbotSmallForConditionalGeneration", BART, two_texts),
    A("plbart", "encoder-decoder", "PLBartForConditionalGeneration", BART, two_texts),
    A("fsmt", "encoder-decoder", "FSMTForConditionalGeneration",
      {**BART, "langs": ["en", "de"], "src_vocab_size": 128, "tgt_vocab_size": 128}, two_texts),
    A("prophetnet", "encoder-decoder", "ProphetNetForConditionalGeneration",
      {**TOKENS, "hidden_size": 64, "num_encoder_layers": 2, "num_decoder_layers": 2, "encoder_ffn_dim": 128,
       "decoder_ffn_dim": 128,
       "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "max_position_embeddings": 64, "ngram": 2,
       "decoder_start_token_id": 0}, two_texts),
    A("pegasus-x", "encoder-decoder", "PegasusXForConditionalGeneration",
      {**BART, "block_size": 4, "num_global_tokens": 2}, two_texts),
    A("nllb-moe", "mixture", "NllbMoeForConditionalGeneration",
      {**BART, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 16}, two_texts),
    # vision
    A("vit", "vision", "ViTForImageClassification", {**VIT, "num_labels": 8}, pixels),
    A("deit", "vision", "DeiTModel", VIT, pixels),
    A("beit", "vision", "BeitModel", {**VIT, "use_relative_position_bias": True}, pixels),
    A("data2vec-vision", "vision", "Data2VecVisionModel", VIT, pixels),
    A("swin", "vision", "SwinModel", SWIN, pixels),
    A("swin-v2", "vision", "Swinv2Model", SWIN, pixels),
    A("dinov2", "vision", "Dinov2Model", {**VIT, "mlp_ratio": 2}, pixels),
    A("dinov2-registers", "vision", "Dinov2WithRegistersModel", {**VIT, "mlp_ratio": 2}, pixels),
    A("dinov3", "vision", "DINOv3ViTModel", VIT, pixels),
    A("ijepa", "vision", "IJepaModel", VIT, pixels),
    A("vit-msn", "vision", "ViTMSNModel", VIT, pixels),
    A("yolos", "vision", "YolosModel", {**VIT, "image_size": [32, 32], "num_detection_tokens": 4}, pixels),
    A("siglip-vision", "vision", "SiglipVisionModel", VIT, pixels),
    A("clip-vision", "vision", "CLIPVisionModel", VIT, pixels),
    A("convnext", "vision", "ConvNextModel", {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2}, pixels),
    A("segformer", "vision", "SegformerModel",
      {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 1], "hidden_sizes": [32, 64], "patch_sizes": [7, 3],
       "strides": [4, 2],
       "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}, pixels),
    A("hiera", "vision", "HieraModel",
      {"image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1], "embed_dim": 32,
       "depths": [1, 1],
       "num_heads": [2, 4], "masked_unit_size": [4, 4], "masked_unit_attention": [True, False], "num_query_pool": 1,
       "query_stride": [2, 2]}, pixels),
    A("videomae", "vision", "VideoMAEModel", {**VIT, "num_frames": 4, "tubelet_size": 2}, frames),
    A("timesformer", "vision", "TimesformerModel", {**VIT, "num_frames": 4}, frames),
    A("pvt-v2", "vision", "PvtV2Model",
      {"image_size": 32, "num_encoder_blocks": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64],
       "num_attention_heads": [1, 2, 2, 4],
       "mlp_ratios": [2, 2, 2, 2], "sr_ratios": [4, 2, 1, 1]}, pixels),
    # audio
    A("whisper", "audio", "WhisperForConditionalGeneration",
      {**BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32}, speech_and_text),
    A("speech-to-text", "audio", "Speech2TextForConditionalGeneration",
      {**BART, "input_feat_per_channel": 16, "conv_channels": 64, "max_source_positions": 64, "max_target_positions": 32},
      speech_frames_and_text),
    A("wav2vec2", "audio", "Wav2Vec2ForCTC", AUDIO, wave),
    A("wav2vec2-stable", "audio", "Wav2Vec2Model",
      {**AUDIO, "do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}, wave),
    A("hubert", "audio", "HubertModel", AUDIO, wave),
    A("wavlm", "audio", "WavLMModel", AUDIO, wave),
    A("ast", "audio", "ASTModel",
      {**BODY, "patch_size": 8, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8}, spectrogram),
    A("wav2vec2-conformer", "audio", "Wav2Vec2ConformerModel", {**AUDIO, "conv_depthwise_kernel_size": 7}, wave),
    A("wav2vec2-bert", "audio", "Wav2Vec2BertModel",
      {**BODY, "feature_projection_input_dim": 32, "conv_depthwise_kernel_size": 7}, mel_frames),
    A("unispeech-sat", "audio", "UniSpeechSatModel", AUDIO, wave),
    A("data2vec-audio", "audio", "Data2VecAudioModel",
      {**AUDIO, "conv_pos_kernel_size": 7, "num_conv_pos_embeddings": 2}, wave),
    A("sew", "audio", "SEWModel", {**AUDIO, "squeeze_factor": 2}, wave),
    # series
    A("patchtst", "series", "PatchTSTModel",
      {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 64,
       "num_attention_heads": 4,
       "ffn_dim": 128, "num_hidden_layers": 2, "do_mask_input": False}, past_values),
    # mixtures of experts
    A("mixtral", "mixture", "MixtralForCausalLM", {**MOE, "num_local_experts": 4}, words),
    A("qwen2-moe", "mixture", "Qwen2MoeForCausalLM",
      {**MOE, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}, words),
    A("qwen3-moe", "mixture", "Qwen3MoeForCausalLM",
      {**MOE, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 64}, words),
    A("olmoe", "mixture", "OlmoeForCausalLM", {**MOE, "num_experts": 4}, words),
    A("granite-moe", "mixture", "GraniteMoeForCausalLM", {**MOE, "num_local_experts": 4}, words),
    A("phimoe", "mixture", "PhimoeForCausalLM", {**MOE, "num_local_experts": 4}, words),
    A("gpt-oss", "mixture", "GptOssForCausalLM", {**MOE, "head_dim": 16, "num_local_experts": 4, "sliding_window": 8}, words),
    A("deepseek-v3", "mixture", "DeepseekV3ForCausalLM",
      {**MOE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
       "moe_intermediate_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
       "v_head_dim": 16}, words),
    A("switch", "mixture", "SwitchTransformersForConditionalGeneration",
      {**T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 16},
       two_texts, seed=7),  # with 0 two experts are within 0.016 of each other for one token: any rounding decides
    A("deepseek-v2", "mixture", "DeepseekV2ForCausalLM",
      {**MOE, "num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 64,
       "kv_lora_rank": 32,
       "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "topk_method": "greedy"}, words),
    A("jamba", "mixture", "JambaForCausalLM",
      {**MOE, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
       "use_mamba_kernels": False}, words),
    # several modalities
    A("clip", "multimodal", "CLIPModel",
      {"text_config": {**TOWER, "eos_token_id": 2}, "vision_config": VIT, "projection_dim": 64},
      words_and_pixels),
    A("siglip", "multimodal", "SiglipModel",
      {"text_config": {**TOWER, "projection_size": 64}, "vision_config": VIT}, words_and_pixels),
    A("blip", "multimodal", "BlipModel",
      {"text_config": {**TOKENS, **TOWER, "encoder_hidden_size": 64}, "vision_config": VIT, "projection_dim": 64},
       words_and_pixels),
    A("altclip", "multimodal", "AltCLIPModel",
      {"text_config": {**TOKENS, **TOWER, "project_dim": 64}, "vision_config": VIT, "projection_dim": 64}, words_and_pixels),
    A("owlvit", "multimodal", "OwlViTModel", {"text_config": {**TOKENS, **TOWER}, "vision_config": VIT, "projection_dim": 64},
      words_and_pixels),
    A("layoutlm", "multimodal", "LayoutLMModel", {**BERT, "max_2d_position_embeddings": 64}, words_with_boxes),
    A("git", "multimodal", "GitForCausalLM", {**BERT, "vision_config": VIT}, words_and_pixels),
    A("internvl", "multimodal", "InternVLForConditionalGeneration",
      {"text_config": {"model_type": "llama", **LLAMA}, "vision_config": {**VIT, "image_size": [32, 32], "patch_size": [8, 8]},
       "image_token_id": 100, "image_seq_length": 4}, few_image_tokens),
    A("idefics3", "multimodal", "Idefics3ForConditionalGeneration",
      {"text_config": {"model_type": "llama", **LLAMA}, "vision_config": VIT, "image_token_id": 100, "scale_factor": 2},
       image_tiles),
    A("llava", "multimodal", "LlavaForConditionalGeneration",
      {"text_config": {"model_type": "llama", **LLAMA}, "vision_config": {"model_type": "clip_vision_model", **VIT},
       "image_token_id": 100, "image_seq_length": 16}, image_tokens),
    A("paligemma", "multimodal", "PaliGemmaForConditionalGeneration",
      {"text_config": {"model_type": "gemma", **GEMMA}, "vision_config": {"model_type": "siglip_vision_model", **VIT},
       "image_token_id": 100, "projection_dim": 64, "hidden_size": 64}, typed_image_tokens),
    A("chameleon", "multimodal", "ChameleonForConditionalGeneration",
      {**LLAMA, "vocabulary_map": {"<image>": 100},
       "vq_config": {"embed_dim": 32, "num_embeddings": 8, "base_channels": 32, "channel_multiplier": [1, 1],
       "latent_channels": 32}}, words),
    # state spaces and other oddities
    A("mamba", "state-space", "MambaForCausalLM",
      {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, words),
    A("mamba2", "state-space", "Mamba2ForCausalLM",
      {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1,
       "chunk_size": 8}, words),
    A("falcon-mamba", "state-space", "FalconMambaForCausalLM",
      {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, words),
    A("bamba", "state-space", "BambaForCausalLM",
      {**LLAMA, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
       "attn_layer_indices": [1]}, words),
    A("rwkv", "state-space", "RwkvForCausalLM",
      {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 64}, unmasked_words),
    A("lfm2", "state-space", "Lfm2ForCausalLM", {**LLAMA, "layer_types": ["conv", "full_attention"]}, words),
    A("recurrent-gemma", "state-space", "RecurrentGemmaForCausalLM",
      {**GEMMA, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8}, words),
)  # fmt: skip


def by_name(name: str) -> Architecture:
    """The row of the zoo with that name; KeyError if there is none."""
    return {architecture.name: architecture for architecture in ZOO}[name]
