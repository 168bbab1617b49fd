"""Whether it worked: held-out figures, answers side by side, benchmarks, comparisons, memorisation.

target      what is evaluated               result     evaluation.json and its rows
held_out    the rows of a run, built again  stages     figures of DPO, KTO and PPO by their own trainer
answers     greedy answers                  formats    whether they are turns of Gemma
rewards     a reward model on pairs         measure    all of the above for one target
compare     two targets on the same rows    overlap    whether one was trained on them
bootstrap   intervals and tests

What measures tasks hands their items on under the key `rows`: `{"part": "task", "task", "item", "metric",
"correct"}` each. They go into evaluation.rows.jsonl, where `--compare` finds them.
"""
