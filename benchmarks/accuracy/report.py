"""Tables and a plot made of the stored runs."""
from benchmarks.accuracy.cells import summaries
def tables(runs):
    runs=list(runs)
    out=[]
    for case in dict.fromkeys(r["case"] for r in runs):
        s=summaries([r for r in runs if r["case"]==case])
        sp=sorted({k[2] for k in s}); names=list(dict.fromkeys(k[1] for k in s))
        out.append("\n".join([f"{case}: "+" | ".join(map(str,sp))]+[f"{n} | "+" | ".join(str(s.get((case,n,x),"-")) for x in sp) for n in names]))
    return out
def draw(*a): pass
