"""The questions of the study, in their order."""

from experiments.study.questions import (
    ablation,
    adaptive,
    better_rule,
    controls,
    corruption,
    full_length,
    main_effect,
    pretrained,
    robustness,
    scarce,
    similarity,
)
from experiments.study.questions.question import Question

QUESTIONS: dict[str, Question] = {
    module.QUESTION.name: module.QUESTION
    for module in (
        *(pretrained, full_length, scarce, better_rule, corruption),
        *(main_effect, ablation, controls),
        *(similarity, adaptive, robustness),
    )
}
"""By name."""
