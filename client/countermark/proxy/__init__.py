"""`countermark proxy`: an OpenAI-compatible endpoint on this machine whose every answer comes from an appraised node.

`http` (a small server), `guard` (who may ask), `wanted` (what is asked), `upstream` (appraised connections), `relay`
and `serving` (one answer's way), `spoken` (OpenAI's words), `ledger`, `journal`, `status` (what can be looked at),
`app` (the routes), `cli` (the command). docs/proxy.md says what each parameter becomes and what is verified when.
"""
