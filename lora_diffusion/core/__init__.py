"""Basic services without any knowledge of adapters: file output, dtypes, memory and hardware."""
