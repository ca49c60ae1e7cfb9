"""Floor 3, deciding: verifiers, evaluations, the release gate, the failure router, the release registry."""
