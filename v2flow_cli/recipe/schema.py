"""Every key of every recipe, with its unit and meaning.

A recipe is one of four kinds, named by its top-level ``kind``: ``autoencoder`` and ``tokenizer`` (for
``v2flow train``), ``lm`` and ``finetune`` (for ``v2flow finetune-llm``). A key on which the result depends has no
default; infrastructure settings have one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

MAX_ASPECT = 4.0  # longest side over shortest side of a picture that keeps its shape; longer pictures are cropped to it


@dataclass(frozen=True)
class ImageData:
    """Where training images come from and how they are cropped."""

    sources: tuple[str, ...]  # folders of images, folders of WebDataset tars, or tars
    crop_size: int  # pixels, side of the square training crop; for other shapes about the square root of the area
    min_scale: float  # smallest share of the photo's short side that a crop covers, in (0, 1]
    horizontal_flip: bool  # mirror half of the crops
    max_scale: float = 1.0  # largest share, in [min_scale, 1]
    shuffle_shards: int = 8  # number of shards whose samples are shuffled together
    workers: int = 1  # loader processes per rank; 0 loads images in the training process
    error_budget: float = 0.001  # share of the samples that may be bad; a larger share stops the training
    aspects: tuple[float, ...] = ()  # width / height of crops, one drawn for each batch; empty: only square crops
    resident_px: int = 0  # side in pixels of squares of all photos, kept on the device; 0: photos are read in each step


@dataclass(frozen=True)
class Optimizer:
    """Optimizer and learning-rate schedule. The learning rate is used as given and not scaled by the batch size."""

    learning_rate: float  # peak
    betas: tuple[float, float]  # of AdamW's two running averages
    weight_decay: float  # for matrices only, not for norms, biases, embeddings or the flow head
    warmup_steps: int  # steps over which the learning rate rises linearly
    schedule: Literal["constant", "cosine"]  # after the warm-up; cosine falls to 2% of the peak, for LMs to 0
    clip_norm: float  # largest gradient norm; larger ones are scaled down
    kind: Literal["adamw", "muon"] = "adamw"  # muon: orthogonalised momentum for matrices, AdamW for the rest


@dataclass(frozen=True)
class TrainLoop:
    """Length, batch and bookkeeping of a run of ``v2flow train``."""

    steps: int  # optimizer steps
    batch_size: int  # images per step over all ranks
    accumulate: int  # micro-batches per step
    ema_decay: float  # of the exponential moving average of the weights, per step
    seed: int  # of initial weights, data order, crops and noise
    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 where the device is fast at it, else fp32
    max_minutes: float = 0.0  # stop (and save) after this wall time; 0 means no limit
    log_every: int = 20  # steps between log lines
    save_minutes: float = 5.0  # wall time between checkpoints; 0: only those of save_every
    save_every: int = 0  # steps between checkpoints, in addition to save_minutes; 0: none
    save_dtype: Literal["fp32", "bf16"] = "fp32"  # of the finished model; weights that determine ids stay fp32
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    skip_bad_steps: int = 0  # steps of non-finite loss or gradient to skip before the run stops
    grid_every: int = 500  # steps between sample reconstructions, always of the same crops; 0: none
    tracker: Literal["auto", "none", "tensorboard", "wandb"] = "auto"  # besides metrics.jsonl; auto: if installed
    compile: bool = True  # on a GPU: compile each step to one graph, which takes minutes; no effect on a CPU
    budgeted: bool = False  # set by `v2flow budget`: a resume may change steps and accumulate


@dataclass(frozen=True)
class Card:
    """Facts for the model card that the training cannot know."""

    license: str = "unknown"  # of the trained model, in the hub's spelling: apache-2.0, cc-by-4.0, ...
    datasets: tuple[str, ...] = ()  # hub ids of the data sets it was trained on


@dataclass(frozen=True)
class AutoencoderModel:
    """The small convolutional autoencoder, f8: images (3, H, W) to latents (C, H/8, W/8)."""

    latent_channels: int  # C, channels of a latent
    encoder_width: int  # channels at 1/8 resolution; half of it at 1/4
    encoder_depth: int  # residual blocks at 1/8 resolution
    decoder_width: int  # as encoder_width
    decoder_depth: int  # as encoder_depth
    latent_noise: float  # standard deviation of the training noise on unit-variance latents


@dataclass(frozen=True)
class AutoencoderLoss:
    """Weights of the pixel losses."""

    mse: float  # mean squared error, pixels in [-1, 1]
    l1: float  # mean absolute error


@dataclass(frozen=True)
class AutoencoderRecipe:
    """``v2flow train``: a small autoencoder for the latents of a tokenizer."""

    kind: Literal["autoencoder"]
    data: ImageData
    model: AutoencoderModel
    loss: AutoencoderLoss
    optimizer: Optimizer
    train: TrainLoop
    output: str  # folder of the trained model
    card: Card = Card()  # licence and data sets, for the model card


@dataclass(frozen=True)
class LatentSource:
    """The frozen autoencoder whose latents are tokenized."""

    autoencoder: str  # folder or hub id: trained here, or a diffusers AutoencoderDC, AutoencoderKL or AutoencoderTiny
    patch_size: int  # latent positions per side of one decoded patch
    cache: str = ""  # a folder, "memory" or "device": where latents of fixed crops are kept; empty: no cache
    cache_crops: int = 1  # crops of each photo in the cache


@dataclass(frozen=True)
class Vocabulary:
    """The LLM vocabulary that visual tokens are mixtures of (section 2.2, Eq. 4)."""

    llm: str  # folder or hub id of a causal LM; "none": no vocabulary
    generator: Literal["tied", "free"]  # tied: scaled cosine with each word; free: the paper's linear map
    logit_scale: float  # tied generator: factor on the cosine
    temperature: float  # of the softmax
    gumbel_noise: float  # factor on the Gumbel noise at the end of its ramp; 1 is Eq. 4
    gumbel_ramp_steps: int  # steps over which the noise rises from 0
    top_k: int  # words mixed per token; 0 mixes the whole vocabulary
    whiten: bool = False  # give the frozen table unit covariance, so that no direction dominates


@dataclass(frozen=True)
class Resampler:
    """V2Flow's resampler: RegStage blocks, spatial downsampler, RegStage blocks, read-out (section 2.2)."""

    hidden_size: int  # channels, and the width d_v of a token
    depth: tuple[int, int]  # RegStage blocks before and after the downsampler
    tokens_per_256px: int  # tokens of a 256 x 256 image: 64, 128 or 256; other sizes in proportion
    other_tokens_per_256px: tuple[int, ...] = ()  # further lengths with the same codebook and decoder
    other_shares: tuple[float, ...] = ()  # share of the training steps for each further length
    kind: Literal["grid"] = "grid"


@dataclass(frozen=True)
class Registers:
    """FlexTok's resampler: registers in a transformer over latent patches, which form one ordered sequence."""

    kind: Literal["registers"]
    hidden_size: int  # width of the transformer, and the width d_v of a token
    depth: int  # blocks
    num_heads: int  # attention heads
    mlp_ratio: float  # hidden width of a block's MLP over hidden_size
    dropout: float  # of both branches of a block
    patch_size: int  # latent positions per side of one encoded patch
    max_tokens: int  # number of registers: the longest sequence, for images of any size
    places: Literal["centre", "spread", "grid"]  # positions: the centre (FlexTok), evenly spread, or cells of a grid
    causal: bool  # a register attends to the registers before it, not to later ones
    nested_dropout: Literal["uniform", "power_of_two", "mixed", "none"]  # prefix lengths in training; none: all tokens
    stem: tuple[int, ...] = ()  # depth of a grid resampler whose features everything starts from; empty: none


@dataclass(frozen=True)
class Quantizer:
    """Nearest-code quantiser with an EMA codebook (section 2.2)."""

    codebook_size: int  # K
    code_size: int  # width of a code; used only with vocabulary.llm "none", otherwise it is the LLM's width
    distance: Literal["cosine", "euclidean"]  # by which the nearest code is found
    ema_decay: float  # of a code's running count and mean, per step
    start_step: int  # steps without quantisation; then the codebook starts from the newest vectors
    revive_after: float  # a code whose running count per step falls below this share of the mean is redrawn
    usage_floor: float  # training stops when codebook usage stays under this share
    # Gradient through the quantiser: copied, or rotated and scaled by the map that takes the vector to its code.
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    kmeans_steps: int = 0  # steps of k-means on the newest vectors before start_step; 0: no k-means
    usage_decay: float = 0.0  # decay of the count that finds dead codes; smaller finds them sooner; 0: ema_decay
    kind: Literal["ema"] = "ema"


@dataclass(frozen=True)
class FSQ:
    """Finite scalar quantiser: rounds each of a few numbers to its levels (arXiv 2309.15505); nothing is learned."""

    kind: Literal["fsq"]
    levels: tuple[int, ...]  # number of values of each number; their product is K
    usage_floor: float  # training stops when codebook usage stays under this share

    start_step = 0  # quantises from the first step

    @property
    def codebook_size(self) -> int:
        """K."""
        return math.prod(self.levels)

    @property
    def code_size(self) -> int:
        """Number of dimensions of a code."""
        return len(self.levels)


@dataclass(frozen=True)
class Context:
    """Masked transformer encoder-decoder (section 2.3); null where flow.kind is transformer."""

    hidden_size: int  # width of the transformer
    encoder_depth: int  # blocks over the tokens and the visible patches
    decoder_depth: int  # blocks that also compute the masked patches
    num_heads: int  # attention heads
    mlp_ratio: float  # hidden width of a block's MLP over hidden_size
    dropout: float  # of both branches of a block
    mask_ratio_min: float  # truncated normal of the mask ratio: minimum,
    mask_ratio_std: float  # and standard deviation around 1


@dataclass(frozen=True)
class Flow:
    """Velocity network: an AdaLN MLP on each position (Eq. 2, 3, 5)."""

    formulation: Literal["rectified_flow", "ddim"]  # Eq. 2, or the diffusion path of Table 3
    hidden_size: int  # width of the MLP
    depth: int  # residual blocks
    time_shift: float  # s in t' = s t / (1 + (s - 1) t); above 1, noisy times are more frequent
    repeats: int  # noise draws per position and step
    # Share of each batch's images that train the velocity network; all images train the context. 0: only regression.
    share: float = 1.0
    kind: Literal["mlp"] = "mlp"


@dataclass(frozen=True)
class FlowTransformer:
    """FlexTok's decoder: a transformer predicts the velocity of all patches together; needs ``context: null``."""

    kind: Literal["transformer"]
    formulation: Literal["rectified_flow", "ddim"]  # Eq. 2, or the diffusion path of Table 3
    hidden_size: int  # width of the transformer
    token_depth: int  # blocks over the tokens alone, computed once per image
    depth: int  # blocks over the noised patches, which attend to the tokens; computed in every sampling step
    num_heads: int  # attention heads
    mlp_ratio: float  # hidden width of a block's MLP over hidden_size
    dropout: float  # of both branches of a block
    time_shift: float  # as in Flow
    repeats: int  # noise draws per image and step
    share: float = 1.0  # share of each batch's images in the flow loss; the regression loss has all. 0: only regression


Solver = Literal["euler", "heun", "dpm++", "ddim"]
GuidanceSchedule = Literal["constant", "linear"]
Guidance = Literal["cfg", "apg"]
#: Command-line option of each field of ``Sampling``.
SAMPLING_OPTIONS = {
    "cfg": "guidance_scale",
    "rounds": "num_mask_steps",
    "steps": "num_flow_steps",
    "solver": "solver",
    "schedule": "guidance_schedule",
    "guidance": "guidance",
    "noise": "noise_temperature",
}


@dataclass(frozen=True)
class Sampling:
    """Default sampling settings of ``decode`` (Algorithm 1, Eq. 7).

    Departs (D11): guidance may rise during sampling. Silent (S9): the scale of the initial noise.
    """

    num_mask_steps: int  # rounds of unmasking
    num_flow_steps: int  # solver steps in each round
    solver: Solver  # of the ODE, Eq. 1
    guidance_scale: float  # 1 means no guidance
    guidance_schedule: GuidanceSchedule  # linear: guidance rises from 1 during sampling
    noise_temperature: float  # factor on the initial noise
    guidance: Guidance = "cfg"  # Eq. 7, or adaptive projected guidance (arXiv 2410.02416)
    apg_momentum: float = -0.5  # factor on the guidance of earlier steps, which is added; negative values subtract it
    apg_threshold: float = 0.05  # largest root mean square of the guidance over an image's latents; 0: no limit
    apg_parallel: float = 0.0  # factor on the part of the guidance that is parallel to the prediction; 1 keeps it


@dataclass(frozen=True)
class TokenizerLoss:
    """Weights of the loss terms, each logged under its own name."""

    flow: float  # Eq. 3
    regression: float  # auxiliary loss: patches predicted from the context by one linear layer
    commit: float  # squared distance of a vector to its code
    batch_entropy: float  # bonus for the entropy of the batch's mean word distribution
    guidance_dropout: float  # share of images with their tokens replaced by the dummy D (Eq. 7); 0: no guidance
    pixels: float = 0.0  # natural log of each image's mean squared pixel error; a difference of 1 is 4.34 dB of PSNR
    ssim: float = 0.0  # 1 - SSIM
    perceptual: float = 0.0  # distance to the photo in the features of a network, set by ``features``
    adversarial: float = 0.0  # minus the score by a critic on the same features, which is trained beside the decoder
    pixel_share: float = 1.0  # share of each batch's images that are decoded for the losses above
    # How pictures are decoded for these losses: in one step without noise, or as the sampling section says.
    pictures: Literal["one_step", "sampling"] = "one_step"
    # For perceptual and adversarial: a safetensors file (SqueezeNet 1.1, VGG16 or AlexNet), or "lpips" (VGG).
    features: str = ""

    @property
    def draws(self) -> bool:
        """Whether any loss needs decoded pictures."""
        return bool(self.pixels or self.ssim or self.needs_features)

    @property
    def needs_features(self) -> bool:
        """Whether any loss needs the network of ``features``."""
        return bool(self.perceptual or self.adversarial)


@dataclass(frozen=True)
class TokenizerRecipe:
    """``v2flow train``: a V2Flow tokenizer."""

    kind: Literal["tokenizer"]
    data: ImageData
    image_size: int  # pixels; the default size of ``encode``
    latents: LatentSource
    vocabulary: Vocabulary
    resampler: Resampler | Registers
    quantizer: Quantizer | FSQ
    context: Context | None
    flow: Flow | FlowTransformer
    sampling: Sampling
    loss: TokenizerLoss
    optimizer: Optimizer
    train: TrainLoop
    output: str  # folder of the trained model
    # A tokenizer to start from, with the same shapes. Context, registers and flow transformer may be deeper; registers
    # may start from a grid.
    init_from: str = ""
    freeze_tokens: bool = False  # train only the decoder; ids stay the same
    refine_steps: int = 0  # of ``encode`` for a given number of tokens: gradient steps on each image
    pixel_decoder: bool = False  # latents to pixels by a copy of the autoencoder's decoder, which is trained too
    card: Card = Card()  # licence and data sets, for the model card


@dataclass(frozen=True)
class LMTrainLoop:
    """Length, batch and bookkeeping of a run of ``v2flow finetune-llm``."""

    steps: int  # optimizer steps
    batch_size: int  # sequences per step over all ranks
    accumulate: int  # micro-batches per step
    seed: int  # of new weights, data order and noise
    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 where the device is fast at it, else fp32
    save_dtype: Literal["fp32", "bf16"]  # of the weights in the output folder
    max_minutes: float = 0.0  # stop (and save) after this wall time, all resumed parts together; 0 means no limit
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time
    log_every: int = 20  # steps between log lines
    save_minutes: float = 5.0  # wall time between checkpoints; 0: only those of save_every
    save_every: int = 0  # steps between checkpoints, in addition to save_minutes; 0: none
    eval_every: int = 0  # steps between held-out losses; 0: only at the end
    keep_checkpoints: int = 1  # newest checkpoints that are kept
    skip_bad_steps: int = 0  # steps of non-finite loss or gradient to skip before the run stops; they count as steps
    budgeted: bool = False  # set by `v2flow budget`: a resume may change steps and accumulate


@dataclass(frozen=True)
class LMModel:
    """A Llama-architecture language model and its byte-level BPE tokenizer."""

    vocab_size: int  # tokens, including three special ones
    hidden_size: int  # width of the transformer
    intermediate_size: int  # of the gated MLP
    num_layers: int  # transformer blocks
    num_heads: int  # attention heads
    num_kv_heads: int  # key and value heads (grouped-query attention)
    max_positions: int  # longest sequence, in tokens
    tie_embeddings: bool  # one table for input and output


@dataclass(frozen=True)
class LMRecipe:
    """``v2flow finetune-llm``: a small Llama-architecture LM from plain text."""

    kind: Literal["lm"]
    text: tuple[str, ...]  # .txt or .gz files, globs allowed; a document is a line, in prose a paragraph
    block_size: int  # tokens per training sequence; documents are packed
    model: LMModel
    optimizer: Optimizer
    train: LMTrainLoop
    output: str  # folder of the trained model
    card: Card = Card()  # licence and data sets, for the model card


@dataclass(frozen=True)
class TokenPairs:
    """(caption, tokens) pairs, and the training samples built from them."""

    token_sets: tuple[str, ...]  # folders or Parquet files that `v2flow encode` wrote from images with captions
    caption_dropout: float  # share of samples with an empty caption, for --llm-cfg
    max_caption_tokens: int  # longer captions are truncated
    train_on_prompt: bool  # False: only the answer has labels
    held_out_share: float  # of the images, chosen by a hash of their key, for the loss on the model card
    photos: tuple[str, ...] = ()  # instead of token_sets: captioned tars or folders, encoded again in every pass
    image_to_text_share: float = 0.0  # share of samples with the image as prompt and the caption as answer
    # Tokens per image. Flexible tokenizer: one of these for each step (empty: all tokens). Tokenizer with several
    # lengths: the length at which photos are encoded (empty: its first).
    lengths: tuple[int, ...] = ()
    # Prefixes of random length, one draw for all images of a step, for a flexible tokenizer. A prefix has no end mark,
    # so that the LLM still learns where a picture ends.
    prefix_lengths: Literal["none", "uniform", "power_of_two"] = "none"
    token_noise: float = 0.0  # up to this share of a picture's input ids is replaced by random ids; labels are not
    label_share: float = 1.0  # share of a picture's ids that have labels in a sample
    shuffle_window: int = 16_384  # samples in the shuffle buffer


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every linear layer; the new rows of the embedding table are trained in full."""

    rank: int  # of the two factors
    alpha: float  # the adapter's output is scaled by alpha / rank
    dropout: float  # of the adapter's input


@dataclass(frozen=True)
class DrawSampling:
    """Default sampling settings of ``generate``, stored in the trained folder's generation_config.json."""

    temperature: float = 1.0  # 0 takes the most probable token
    top_k: int = 0  # sample from the k most probable tokens; 0: from all
    top_p: float = 1.0  # sample from the most probable tokens with this total probability
    guidance_scale: float = 1.0  # of the LLM; 1 means none


@dataclass(frozen=True)
class FinetuneRecipe:
    """``v2flow finetune-llm``: teach a causal LM the visual tokens (section 2.4)."""

    kind: Literal["finetune"]
    llm: str  # folder or hub id of any Hugging Face causal LM with a fast tokenizer
    tokenizer: str  # folder or hub id of the image tokenizer that wrote the token sets
    new_rows: Literal["codebook", "random", "kept"]  # initial rows of the visual tokens; kept: llm already has them
    mode: Literal["full", "lora", "rows"]  # what is trained: all weights; adapters and new rows; only the new rows
    lora: Lora | None  # for mode lora, else null
    data: TokenPairs
    z_loss: float  # weight of the squared log-normaliser of the softmax; 0 means none
    optimizer: Optimizer
    train: LMTrainLoop
    output: str  # folder of the trained model
    caption_contrast: float = 0.0  # weight of a loss: from a middle layer, predict the histogram of the image's codes
    sampling: DrawSampling = DrawSampling()
    sample_every: int = 0  # steps between sample pictures in OUTPUT/samples; 0: none
    sample_prompts: tuple[str, ...] = ("a red fox", "a boat on the sea")  # prompts of the sample pictures
    card: Card = Card()  # licence and data sets, for the model card


Recipe = AutoencoderRecipe | TokenizerRecipe | LMRecipe | FinetuneRecipe
KINDS: dict[str, type] = {
    "autoencoder": AutoencoderRecipe,
    "tokenizer": TokenizerRecipe,
    "lm": LMRecipe,
    "finetune": FinetuneRecipe,
}
