"""Arguments of the trainers: transformers' own, and what each method adds."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from pad_kernels._checks import check_choice, check_flag, check_integer, check_number, fail_value

OVERLONG = ("error", "drop")


@dataclass
class DistillationConfig(TrainingArguments):
    """What all trainers share, beside :class:`transformers.TrainingArguments`.

    ``per_device_train_batch_size`` counts rows of the data set (prompts), each with all its
    responses. Every loss is a mean over the whole effective batch: over the micro-batches of a step
    and over all ranks.

    Args:
        max_length: tokens of a prompt and one of its responses together; default: the model's
            context, ``max_position_embeddings``.
        overlong: what becomes of a row with a longer one: "error", or "drop", which leaves the row
            out and says how many there were. Nothing is ever cut off.
        padding_free: lay the sequences of a batch end to end instead of padding them. The model
            must keep them apart by their position ids; the first batch checks that it does.
        dataset_num_proc: processes that tokenise.
        liger_kernel_config: with ``use_liger_kernel``, which of Liger's layers to use; its losses
            stay off.
    """

    remove_unused_columns: bool = False  # the collator takes what it needs
    max_length: int | None = None
    overlong: str = "error"
    padding_free: bool = False
    dataset_num_proc: int | None = None
    liger_kernel_config: dict[str, bool] | None = None

    def __post_init__(self) -> None:
        if not self.average_tokens_across_devices:
            expected = "True: denominators are counted over all ranks"
            fail_value("average_tokens_across_devices", expected, False)
        super().__post_init__()
        if self.max_length is not None:
            check_integer("max_length", self.max_length, at_least=2)
        check_choice("overlong", self.overlong, OVERLONG)
        check_flag("padding_free", self.padding_free)
        if self.remove_unused_columns:
            fail_value("remove_unused_columns", "False: rows are tokenised by the trainer", True)
        if self.label_smoothing_factor:
            expected = "0: the losses here do not read it"
            fail_value("label_smoothing_factor", expected, self.label_smoothing_factor)
        if self.use_liger_kernel:
            self.liger_kernel_config = _without_losses(self.liger_kernel_config or {})


def _without_losses(config: dict[str, bool]) -> dict[str, bool]:
    """Liger's layers without its losses, which would take the model's forward over."""
    for name in ("cross_entropy", "fused_linear_cross_entropy"):
        if config.get(name):
            fail_value(f"liger_kernel_config[{name!r}]", "False: the loss is this library's", True)
    return {**config, "cross_entropy": False, "fused_linear_cross_entropy": False}


@dataclass
class PADConfig(DistillationConfig):
    """Preference-Aligned Distillation (arXiv 2502.14272).

    Args:
        beta: scale of student and teacher rewards; 10 in the paper's released configuration.
        kind: jsd, kl, reverse_kl, ranking, top1 or jsd_released, see
            :func:`pad_kernels.listwise_preference_loss`.
        subset_size: the decomposed loss: responses ranked at once.
    """

    beta: float = 10.0
    kind: str = "jsd"
    subset_size: int | None = None


@dataclass
class DCKDConfig(DistillationConfig):
    """Dual-constrained knowledge distillation (arXiv 2502.17927), and plain distillation.

    The loss is SFT(chosen) + alpha · (mean KL over chosen tokens + mean KL over rejected tokens).

    Args:
        alpha: weight of the two divergences.
        divergence: forward_kl as published, or another of :func:`pad_kernels.linear_divergence`.
        divergence_alpha: the mixture of those that have one.
        use_rejected: False leaves the rejected responses out: knowledge distillation on the chosen
            ones, or on the column ``completion`` of a data set without preferences.
    """

    alpha: float = 0.1
    divergence: str = "forward_kl"
    divergence_alpha: float | None = None
    use_rejected: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, at_least=0.0)
        check_flag("use_rejected", self.use_rejected)


@dataclass
class ADPAConfig(DistillationConfig):
    """Advantage-guided distillation (arXiv 2502.17927).

    The loss is SFT(chosen) - gamma · mean over the tokens of the student's own responses of
    sum_a student(a) beta log(aligned(a) / reference(a)). ADPA+ is the same from a DCKD checkpoint.

    Args:
        gamma: weight of the advantage.
        beta: scale of the log-ratio; the beta of the aligned teacher's DPO.
    """

    gamma: float = 1.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, at_least=0.0)
        check_number("beta", self.beta, above=0.0)


@dataclass
class PreferenceConfig(DistillationConfig):
    """Preference losses and supervised fine-tuning.

    Args:
        loss: a kind of :func:`pad_kernels.pairwise_preference_loss` (dpo, ipo, simpo, ...); orpo;
            cpo; kto or apo_zero_unpaired; sft.
        beta: inverse temperature; default 2 for simpo (its paper has 2 to 2.5), else 0.1.
        label_smoothing, discopop_tau, gamma, reward_shift: options of some kinds, see there.
        cpo_kind: sigmoid, hinge, ipo or simpo.
        nll_weight: weight of the chosen response's mean negative log-prob in cpo.
        desirable_weight, undesirable_weight: of kto's two kinds of responses.
    """

    loss: str = "dpo"
    beta: float | None = None
    label_smoothing: float | None = None
    discopop_tau: float | None = None
    gamma: float | None = None
    reward_shift: float | None = None
    cpo_kind: str = "sigmoid"
    nll_weight: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
