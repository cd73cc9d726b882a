"""Rubricor and Judge trained by TRL: `trl_trainers` gives the alternation SFTTrainer and GRPOTrainer for its updates.

    actor.py      a decoder's `transformers` twin, on the same memory where it can be
    arguments.py  our settings as SFTConfig and GRPOConfig
    fit.py        one training: resumed, logged, brought back to the decoder
    warm_up.py    SFT of both            rubricor.py  GRPO of the Rubricor            judge.py  GRPO of the Judge

TRL is imported when it is asked for, never with the package.
"""
