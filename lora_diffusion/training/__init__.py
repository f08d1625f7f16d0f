"""Train an adapter: the one loop and what feeds it. The home of Accelerate and PEFT."""
