"""What trains and what is attached: methods, injection, attaching and swapping. Only this folder touches peft."""
