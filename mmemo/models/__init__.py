"""Encoders, fusions and heads; the one interface is `Stream -> Stream`, `{name: Stream} -> Fused`.

Begin with `base`. Nothing is imported here.

base            `Multimodal` and the simplest parts of a model: pooling, projection, concatenation,
                heads; `precompute` for frozen encoders, `predict` for a whole data set.
text            `Tokenizer`, `TextEncoder` and `WordEmbeddings`: words to tokens to vectors;
                `resolve_weights` says where weights of a name are found.
lora            `add_lora`: low-rank updates of a text encoder, by hand and by peft;
                `save_adapter` and `load_adapter` for their files.
normalized      `NormalizedConcat` and `normalized_model`: LayerNorm for each modality
                and after each layer.
temporal        `Resample` makes streams of one length; `TCN` is a temporal convolution network,
                `receptive_field` says how far it looks.
attention       `masked_softmax`, `Clock` and `CrossAttention`: attention by content and by time,
                in which a row without a real step gets zeros.
crossmodal      `CrossModalFusion` lets streams ask each other, `DynamicFusion` weighs them;
                `attention_mass` measures where a model looked.
products        `ProductFusion`, `TensorFusion`, `LowRankFusion`: fusions that multiply;
                `Summaries`, one vector a modality, with which most fusions begin.
fusion          `get_fusion`: the fusions by name; `same_budget` makes them comparable,
                `ModalityDropout` loses modalities in training.
stacked         `Encoders`: many transformer encoders side by side, as one product each;
                `cheap_dropout` and `attend_cached` for a CPU.
mult            `CrossModalTransformer` (MulT), made of stacked encoders;
                `LastState`, an LSTM over real steps only.
audiovisual     `R3D` over raw frames, `LogMel` and `WaveCNN` over raw sound;
                `Frames` picks and resizes the frames of a clip.
backbones       `SpeechEncoder` and `ImageEncoder`: transformers of others behind a stream,
                without their padding in the answer.
cache           `FeatureCache`: outputs of a frozen encoder on disk, computed once, ever;
                `encoder_identity` tells when the encoder is another one.
adversary       `AdversaryHead`: a head that names the speaker behind a gradient reversal;
                `ramp_strength` turns it up.
initialisation  `initialise` begins a model by one of six strategies;
                `measure_signal` measures its signal forwards and back.
lfm2            `Lfm2Fusion`: a fusion of a language model's blocks;
                `pack_steps` keeps padding out of them.
catalogue       the fusions and heads that come with mmemo, and their options;
                names and schemas only, so nothing heavy is imported.
"""
