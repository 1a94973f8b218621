"""Data: the record schema, the embedded scenes and their tokenizer. `datasets` is imported only where it is used."""
