"""Figures of README and docs: experiments, the small files that they write, and the tables and plots made from these.

python -m figures status      what there is, what is missing, what is out of date
python -m figures run         runs what is missing or out of date; `make figures` does so in the background
python -m figures fill        fills the blocks of README and docs, and draws the plots: `make docs-figures`
"""
