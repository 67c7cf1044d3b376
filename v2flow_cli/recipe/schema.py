"""Every knob of every recipe, with its unit and meaning.

A recipe is one of four kinds, named by its top-level ``kind``: ``autoencoder`` and ``tokenizer`` (for
``v2flow train``), ``lm`` and ``finetune`` (for ``v2flow finetune-llm``). Whatever a result depends on has no
default and must stand in the YAML; defaults are for plumbing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

MAX_ASPECT = 4.0  # long side over short side of a picture that keeps its shape; a longer one loses its ends


@dataclass(frozen=True)
class ImageData:
    """Where training images come from and how they are cropped."""

    sources: tuple[str, ...]  # folders of images, folders of WebDataset tars, or tars
    crop_size: int  # pixels, side of the square training crop; of others the root of the area, nearly
    min_scale: float  # smallest share of the photo's short side that a crop covers, in (0, 1]
    horizontal_flip: bool  # mirror half of the crops
    max_scale: float = 1.0  # largest share, in [min_scale, 1]
    shuffle_shards: int = 8  # shards whose samples are mixed at a time
    workers: int = 1  # loader processes per rank; 0 loads in the training process
    error_budget: float = 0.001  # share of the samples that may be bad; more of them stop the training
    aspects: tuple[float, ...] = ()  # width / height of crops, one drawn for each batch; empty: square ones alone
    resident_px: int = 0  # side of the squares of all photos that are kept on the device; 0: photos are read anew


@dataclass(frozen=True)
class Optimizer:
    """Linear warm-up; the learning rate is the one really used (already scaled to the batch)."""

    learning_rate: float  # peak
    betas: tuple[float, float]  # of AdamW's two running averages
    weight_decay: float  # matrices only: never on norms, biases, embeddings or the flow head
    warmup_steps: int  # linear rise of the learning rate
    schedule: Literal["constant", "cosine"]  # after the warm-up; cosine falls to 2% of the peak, to 0 for LMs
    clip_norm: float  # largest gradient norm; larger ones are scaled down
    kind: Literal["adamw", "muon"] = "adamw"  # muon: matrices by orthogonalised momentum, the rest by AdamW


@dataclass(frozen=True)
class TrainLoop:
    """Length, batch and bookkeeping of a run of ``v2flow train``."""

    steps: int  # optimizer steps
    batch_size: int  # images per step over all ranks
    accumulate: int  # micro-batches per step
    ema_decay: float  # of the exponential moving average of the weights, per step
    seed: int  # of initial weights, data order, crops and noise
    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 where the hardware is fast at it
    max_minutes: float = 0.0  # stop (and save) after this wall time; 0 means no limit
    log_every: int = 20  # steps
    save_minutes: float = 5.0  # wall time between checkpoints; 0: none but by save_every
    save_every: int = 0  # steps between checkpoints, beside those by save_minutes; 0: none
    save_dtype: Literal["fp32", "bf16"] = "fp32"  # of the finished model on disk, but for what makes ids
    keep_checkpoints: int = 2
    skip_bad_steps: int = 0  # steps of non-finite loss or gradient to skip before the run stops
    grid_every: int = 500  # steps between pictures of the same crops and what comes back, and one at the end; 0: none
    tracker: Literal["auto", "none", "tensorboard", "wandb"] = "auto"  # beside metrics.jsonl; auto: what is installed
    compile: bool = True  # on a GPU: one compiled graph a step, which takes minutes to make; CPUs run the plain one
    budgeted: bool = False  # set by `v2flow budget`: a resume may change steps and accumulate


@dataclass(frozen=True)
class Card:
    """What the model card says that a training does not know."""

    license: str = "unknown"  # of the trained model, as the hub spells it: apache-2.0, cc-by-4.0, ...
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
    """``v2flow train``: an autoencoder of our own, for the latents of a tokenizer."""

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

    autoencoder: str  # folder or hub id: ours, or a diffusers AutoencoderDC / AutoencoderKL / AutoencoderTiny
    patch_size: int  # latent positions per side of one decoded patch
    cache: str = ""  # a folder, "memory" or "device" keeps latents of fixed crops; empty computes them at each step
    cache_crops: int = 1  # crops of each photo that are kept


@dataclass(frozen=True)
class Vocabulary:
    """The LLM vocabulary that visual tokens live in (section 2.2, Eq. 4)."""

    llm: str  # folder or hub id of a causal LM; "none" is the ablation without a vocabulary
    generator: Literal["tied", "free"]  # tied: scaled cosine with each word; free: the paper's linear map
    logit_scale: float  # tied generator: factor on the cosine
    temperature: float  # of the softmax
    gumbel_noise: float  # factor on the Gumbel noise at the end of its ramp; 1 is Eq. 4
    gumbel_ramp_steps: int  # steps over which the noise rises from 0
    top_k: int  # words mixed per token; 0 mixes the whole vocabulary
    whiten: bool = False  # give the frozen table unit covariance, so that no direction drowns the others


@dataclass(frozen=True)
class Resampler:
    """RegStage blocks, spatial downsampler, RegStage blocks, read-out (section 2.2)."""

    hidden_size: int  # channels, and the width d_v of a token
    depth: tuple[int, int]  # RegStage blocks before and after the downsampler
    tokens_per_256px: int  # n for a 256 x 256 image: 64, 128 or 256; other sizes in proportion
    other_tokens_per_256px: tuple[int, ...] = ()  # lengths that the same codebook and decoder offer beside n
    other_shares: tuple[float, ...] = ()  # of the training steps, for each of them; the remaining steps train n
    kind: Literal["grid"] = "grid"


@dataclass(frozen=True)
class Registers:
    """The other resampler: registers in a transformer over latent patches, one ordered sequence (FlexTok)."""

    kind: Literal["registers"]
    hidden_size: int  # width of the transformer, and the width d_v of a token
    depth: int  # blocks
    num_heads: int  # attention heads
    mlp_ratio: float  # hidden width of a block's MLP over hidden_size
    dropout: float  # of both branches of a block
    patch_size: int  # latent positions per side of one encoded patch
    max_tokens: int  # registers; the longest sequence of an image of any size
    places: Literal["centre", "spread"]  # of registers: all on the middle (FlexTok), or each its own, evenly spread
    causal: bool  # a register sees the registers before it, not those behind
    nested_dropout: Literal["uniform", "power_of_two", "none"]  # prefix lengths trained; none: the whole sequence


@dataclass(frozen=True)
class Quantizer:
    """Nearest-code quantiser with an EMA codebook (section 2.2)."""

    codebook_size: int  # K
    code_size: int  # width of a code; ignored (the LLM's width) unless vocabulary.llm is "none"
    distance: Literal["cosine", "euclidean"]  # by which a code is the nearest
    ema_decay: float  # of a code's running count and mean, per step
    start_step: int  # steps without quantisation; then the codebook is the newest real vectors
    revive_after: float  # a code whose running count per step falls below this share of the mean is redrawn
    usage_floor: float  # training stops when usage stays under this share
    # How the gradient passes the quantiser: copied, or turned and scaled as the vector is into its code.
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    kmeans_steps: int = 0  # steps of k-means before start_step, from the newest real vectors; 0 takes these themselves
    usage_decay: float = 0.0  # of the running count that finds dead codes, where it shall forget sooner; 0: ema_decay
    kind: Literal["ema"] = "ema"


@dataclass(frozen=True)
class FSQ:
    """The other quantiser: each of a few numbers rounded to its own levels (arXiv 2309.15505); nothing is learned."""

    kind: Literal["fsq"]
    levels: tuple[int, ...]  # values each number can take; their product is K
    usage_floor: float  # training stops when usage stays under this share

    start_step = 0  # it quantises from the first step

    @property
    def codebook_size(self) -> int:
        """K."""
        return math.prod(self.levels)

    @property
    def code_size(self) -> int:
        """Numbers in a code."""
        return len(self.levels)


@dataclass(frozen=True)
class Context:
    """Masked transformer encoder-decoder (section 2.3); null where flow.kind is transformer."""

    hidden_size: int  # width of the transformer
    encoder_depth: int  # blocks over tokens and visible patches
    decoder_depth: int  # blocks that also answer the hidden patches
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
    time_shift: float  # s in t' = s t / (1 + (s - 1) t); more weight on noisy times
    repeats: int  # noise draws per position and step
    # Share of each batch's images on which the velocity network is trained; the context sees all. 0: regression alone.
    share: float = 1.0
    kind: Literal["mlp"] = "mlp"


@dataclass(frozen=True)
class FlowTransformer:
    """The other decoder: a transformer gives the velocity of all patches at once (FlexTok); needs context: null."""

    kind: Literal["transformer"]
    formulation: Literal["rectified_flow", "ddim"]  # as for the MLP
    hidden_size: int  # width of the transformer
    token_depth: int  # blocks over the tokens alone, computed once an image
    depth: int  # blocks over the noised patches, which read the tokens, computed at every step
    num_heads: int  # attention heads
    mlp_ratio: float  # hidden width of a block's MLP over hidden_size
    dropout: float  # of both branches of a block
    time_shift: float  # as for the MLP
    repeats: int  # noise draws per image and step
    share: float = 1.0  # of each batch's images that the flow loss sees; the regression loss sees all. 0: it alone


Solver = Literal["euler", "heun", "dpm++", "ddim"]
GuidanceSchedule = Literal["constant", "linear"]
Guidance = Literal["cfg", "apg"]
#: What the command line calls the fields of ``Sampling``.
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
    """How ``decode`` samples unless told otherwise (Algorithm 1, Eq. 7).

    Departs (D11): guidance may rise along the sampling. Silent (S9): the scale of the initial noise.
    """

    num_mask_steps: int  # rounds of unmasking
    num_flow_steps: int  # solver steps in each round
    solver: Solver  # of the ODE, Eq. 1
    guidance_scale: float  # 1 means no guidance
    guidance_schedule: GuidanceSchedule  # linear rises from 1 as the sampling goes on
    noise_temperature: float  # factor on the initial noise
    guidance: Guidance = "cfg"  # Eq. 7, or adaptive projected guidance (arXiv 2410.02416)
    apg_momentum: float = -0.5  # share of the earlier steps' guidance that is added; below 0 it is taken away
    apg_threshold: float = 0.05  # largest root mean square of the guidance over an image's latents; 0: no limit
    apg_parallel: float = 0.0  # share kept of the guidance along the prediction itself; 1 keeps all


@dataclass(frozen=True)
class TokenizerLoss:
    """Weights of the loss terms, each logged under its own name."""

    flow: float  # Eq. 3
    regression: float  # auxiliary: patches from the context by one linear layer
    commit: float  # squared distance of a vector to its code
    batch_entropy: float  # bonus for the entropy of the batch's mean word distribution
    guidance_dropout: float  # share of images whose tokens become the dummy D (Eq. 7); 0 where nothing is guided
    pixels: float = 0.0  # natural log of an image's squared error in pixels, averaged: 1 is 4.34 dB of PSNR
    ssim: float = 0.0  # 1 - SSIM
    perceptual: float = 0.0  # distance to the photo in the features of a network, see ``features``
    pixel_share: float = 1.0  # share of each batch's images that are drawn for pixels, ssim and perceptual
    pictures: Literal["one_step", "sampling"] = "one_step"  # how: one step without noise, or by the sampling section
    features: str = ""  # of perceptual: a safetensors file (SqueezeNet 1.1, VGG16 or AlexNet), or "lpips" (VGG)

    @property
    def draws(self) -> bool:
        """Whether some of the losses are of pictures."""
        return bool(self.pixels or self.ssim or self.perceptual)


@dataclass(frozen=True)
class TokenizerRecipe:
    """``v2flow train``: a V2Flow tokenizer."""

    kind: Literal["tokenizer"]
    data: ImageData
    image_size: int  # pixels, default of ``encode``
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
    init_from: str = ""  # a tokenizer folder to start from, of the same shapes; the context may be deeper
    freeze_tokens: bool = False  # train the decoder alone; every id keeps its meaning
    card: Card = Card()  # licence and data sets, for the model card


@dataclass(frozen=True)
class LMTrainLoop:
    """Length, batch and bookkeeping of a run of ``v2flow finetune-llm``."""

    steps: int  # optimizer steps
    batch_size: int  # sequences per step over all ranks
    accumulate: int  # micro-batches per step
    seed: int
    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 on GPUs that have it, float32 elsewhere
    save_dtype: Literal["fp32", "bf16"]  # of the weights in the output folder
    max_minutes: float = 0.0  # stop (and save) after this wall time, resumed parts included; 0 means no limit
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time
    log_every: int = 20  # steps
    save_minutes: float = 5.0  # wall time between checkpoints; 0: none but by save_every
    save_every: int = 0  # steps between checkpoints, beside those by save_minutes; 0: none
    eval_every: int = 0  # steps between held-out losses on the way; 0: only at the end
    keep_checkpoints: int = 1
    skip_bad_steps: int = 0  # steps of non-finite loss or gradient to skip before the run stops; they count as steps
    budgeted: bool = False  # set by `v2flow budget`: a resume may change steps and accumulate


@dataclass(frozen=True)
class LMModel:
    """A Llama-architecture language model and its byte-level BPE tokenizer."""

    vocab_size: int  # tokens, the three special ones included
    hidden_size: int
    intermediate_size: int  # of the gated MLP
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_positions: int  # longest sequence, in tokens
    tie_embeddings: bool  # one table for input and output


@dataclass(frozen=True)
class LMRecipe:
    """``v2flow finetune-llm``: a small Llama-architecture LM from plain text."""

    kind: Literal["lm"]
    text: tuple[str, ...]  # .txt or .gz files, globs allowed; documents are lines, or paragraphs in prose
    block_size: int  # tokens per training sequence; documents are packed
    model: LMModel
    optimizer: Optimizer
    train: LMTrainLoop
    output: str  # folder of the trained model
    card: Card = Card()  # licence and data sets, for the model card


@dataclass(frozen=True)
class TokenPairs:
    """(caption, tokens) pairs and how they become samples."""

    token_sets: tuple[str, ...]  # folders that `v2flow encode` wrote, or its Parquet files; tars give captions
    caption_dropout: float  # share of samples whose caption is left empty, for --llm-cfg
    max_caption_tokens: int  # longer captions are cut
    train_on_prompt: bool  # False: labels on the answer alone
    held_out_share: float  # of the images, chosen by a hash of their key, for the loss on the model card
    photos: tuple[str, ...] = ()  # instead of token_sets: captioned tars or folders, encoded anew in every pass
    image_to_text_share: float = 0.0  # of samples whose image is the prompt and whose caption is the answer
    # Tokens an image: of a flexible tokenizer drawn from these, of one with several lengths the one to encode photos
    # at. Empty: all, or the first length.
    lengths: tuple[int, ...] = ()
    token_noise: float = 0.0  # up to this share of a picture's ids is read as random ones; labels stay
    label_share: float = 1.0  # of a picture's ids that are learned in a sample; the others are only read
    shuffle_window: int = 16_384  # samples in memory that the next one is drawn from


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every linear layer; the new rows are trained whole beside them."""

    rank: int
    alpha: float
    dropout: float


@dataclass(frozen=True)
class DrawSampling:
    """How ``generate`` draws by default; the trained folder keeps it in generation_config.json."""

    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep this probability mass
    guidance_scale: float = 1.0  # of the LLM; 1 means none


@dataclass(frozen=True)
class FinetuneRecipe:
    """``v2flow finetune-llm``: teach a causal LM the visual tokens (section 2.4)."""

    kind: Literal["finetune"]
    llm: str  # folder or hub id of any Hugging Face causal LM with a fast tokenizer
    tokenizer: str  # folder or hub id of the image tokenizer that made the token sets
    new_rows: Literal["codebook", "random", "kept"]  # the visual tokens' rows start from; kept: llm draws already
    mode: Literal["full", "lora", "rows"]  # train all weights, adapters and the new rows, or the new rows alone
    lora: Lora | None  # only for mode lora
    data: TokenPairs
    z_loss: float  # weight of the squared log-normaliser; 0 means none
    optimizer: Optimizer
    train: LMTrainLoop
    output: str  # folder of the trained model
    caption_contrast: float = 0.0  # weight of: from a middle layer, predict the histogram of the image's codes
    sampling: DrawSampling = DrawSampling()
    sample_every: int = 0  # steps between sample pictures in OUTPUT/samples; 0 draws none
    sample_prompts: tuple[str, ...] = ("a red fox", "a boat on the sea")  # what they show
    card: Card = Card()  # licence and data sets, for the model card


Recipe = AutoencoderRecipe | TokenizerRecipe | LMRecipe | FinetuneRecipe
KINDS: dict[str, type] = {
    "autoencoder": AutoencoderRecipe,
    "tokenizer": TokenizerRecipe,
    "lm": LMRecipe,
    "finetune": FinetuneRecipe,
}
