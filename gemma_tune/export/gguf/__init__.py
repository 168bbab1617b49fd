"""GGUF, the file that llama.cpp, Ollama and others read, written with the official `gguf` package.

vocabulary.py   tokenizer.json -> pieces, scores and types with which llama.cpp finds the same tokens
facts.py        config.json -> what llama.cpp has to know of the model, and what it takes for granted
tensors.py      names, types and bytes of the tensors
write.py        a whole model
lora.py         an adapter alone

Only generations are written whose files were held against transformers in llama.cpp itself: `make verify-gguf`.
"""
