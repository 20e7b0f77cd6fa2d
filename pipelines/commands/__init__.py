"""The commands of `asr`, by group: each module adds its own to `options.app`."""
