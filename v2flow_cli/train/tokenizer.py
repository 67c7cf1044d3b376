class TokenizerObjective: pass
