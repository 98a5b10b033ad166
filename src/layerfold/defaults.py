"""Settings that recipes and commands share, importable without torch."""

CALIBRATION_TOKENS = 16_384
"""Tokens of calibration text."""

REPAIR_TOKENS = 65_536
"""Tokens of calibration text that a repair is fitted to."""

LIMIT_TOKENS = 65_536
"""Tokens of test text that a study's perplexity is measured on, unless its recipe says otherwise."""

SELECTION_TOKENS = 16_384
"""Tokens of validation text that a search judges its candidates by."""

CONTEXT = 2048
"""Longest window that text is cut into unless a recipe says otherwise; a model's own maximum where that is less."""

GROUP_SIZES = (2, 4, 6, 8, 10)
"""Values of n in the published comparison."""

PLANNED = f"{100 * 82 / 124.44:.4f}%"
"""The share of the parameters that planned_82M leaves: DistilGPT-2's 82 million of GPT-2's 124.44."""

PRUNED = f"{100 * 104.69 / 124.44:.4f}%"
"""What the published pruned_104M leaves of GPT-2's 124.44 million parameters other than zero."""
