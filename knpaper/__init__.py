"""The study: what models are asked, how edits are judged, claims with their rules and records, and figures."""
