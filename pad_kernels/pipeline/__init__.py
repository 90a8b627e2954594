"""From prompts to a distilled student in commands: sample, score, cache, train, eval.

- ``yaml_file``, ``settings``: one YAML file to checked settings.
- ``rows``, ``parts``: data sets in and out, part by part, so that a killed stage goes on.
- ``models``: models and tokenizers from local folders.
- ``sample``, ``score`` (``questions``), ``teacher_cache``, ``train`` (``methods``,
  ``checkpoints``), ``evaluate``: the stages.
- ``command``: the command line.
"""
