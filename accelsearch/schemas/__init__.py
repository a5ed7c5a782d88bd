"""JSON Schemas of the files that we write; see `accelsearch.schema`."""
