"""The `Engine` protocol over vLLM's own servers, in other processes or on other machines.

engine.py     requests in flight, from the rollout's thread to an event loop and back
fleet.py      which servers are there, which hold the present weights, what goes where
client.py     one server over HTTP: the door of aiohttp
answers.py    what a server may say
weights.py    new weights through a folder that all see
transfer.py   new weights between GPUs, through vLLM's weight transfer
identity.py   what two sides have in common before they exchange tokens
gate.py       the server's side: who does not know the secret learns nothing
"""
